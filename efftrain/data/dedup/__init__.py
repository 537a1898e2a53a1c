"""Deduplication: exact, by lines, and near duplicates by MinHash, with a planted canary.

It may import ``data.stages`` and ``data.documents``.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
