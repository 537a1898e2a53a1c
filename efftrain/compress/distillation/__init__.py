"""Distillation: objectives of a student, features, on-policy rows, the cache of a teacher.

It may import ``compress.layerwise`` and ``compress.structured``.
"""
