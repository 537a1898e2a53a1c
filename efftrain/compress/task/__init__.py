"""Distillation for one task: the loss, the teacher's labels and texts, and the runs.

It may import ``compress.distillation``.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
