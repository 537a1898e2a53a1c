"""Reads batches from packed corpora: shuffled, mixed, divided among processes, and resumable at any batch.

This package may import ``data.storage`` and ``data.corpus``.
"""
