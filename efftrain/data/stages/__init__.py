"""Runs a build in stages: items, engines, the documents that are passed between stages, and records of removals.

This package may import ``data.storage`` and ``data.documents``, and contains no particular stage.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
