"""Distillation for one task: the loss, the teacher's labels and texts, the runs, and what they are compared with.

It may import ``compress.distillation`` and ``compress.in_memory``.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
