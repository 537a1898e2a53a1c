"""Reads documents from files, one module per format. A source is divided into pieces, which workers read in parallel.

This package may import ``data.documents``.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
