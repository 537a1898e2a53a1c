"""Deduplication: exact, by lines, and near duplicates by MinHash, with a planted canary.

It may import ``data.stages`` and ``data.documents``.
"""
