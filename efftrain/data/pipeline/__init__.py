"""Builds a corpus: the sequence of its stages, the first stage (reading) and the last one (writing).

This package may import every other folder of ``data`` except ``loading`` and ``tasks``.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
