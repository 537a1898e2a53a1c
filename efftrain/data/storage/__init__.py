"""Stores data on disk: shards, the folder of a corpus, tokenizers, packed tokens, teacher caches.

This package may import only ``data.documents`` and ``data.batching``.
"""
