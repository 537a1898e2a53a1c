"""Distillation for one task: the teacher, what it says, the runs.

It may import ``compress.distillation``.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
