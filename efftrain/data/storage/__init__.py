"""What lies on disk: shards, the folder of a corpus, tokenizers, packed tokens, teacher caches.

It may import ``data.documents`` and ``data.batching`` alone.
"""
