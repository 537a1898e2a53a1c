"""Removes exact duplicates, repeated lines and near duplicates (MinHash), and measures recall with planted canaries.

This package may import ``data.stages`` and ``data.documents``.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
