"""Keeps evaluation and training texts apart: the definition of contamination, and the stages that remove it.

This package may import ``data.stages`` and ``data.dedup.shingles``.
"""
