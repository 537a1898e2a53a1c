"""Distillation for one task: the teacher, what it says, the runs.

It may import ``compress.distillation``.
"""
