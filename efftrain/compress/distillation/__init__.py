"""Distillation: objectives and runs of a student, feature losses, on-policy training, and the cache of a teacher.

It may import ``compress.layerwise`` and ``compress.structured``.
"""
