"""Keeps evaluation and training texts apart: what counts as contaminated, and the stages that find it.

It may import ``data.stages`` and ``data.dedup.shingles``.
"""
