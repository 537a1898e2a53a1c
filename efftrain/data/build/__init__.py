"""Builds a corpus: the sequence of its stages, the first stage (reading) and the last one (writing).

This package may import every other folder of ``data`` except ``loading`` and ``tasks``.
"""
