"""Batches from packed corpora: shuffled, mixed, divided among processes, resumable to the batch.

It may import ``data.storage`` and ``data.corpus``.
"""
