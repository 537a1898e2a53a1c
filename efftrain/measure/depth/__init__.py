"""Calibration of adaptive depth in decoding: early exits, self-speculation, and the risk that is guaranteed.

It may import ``measure.quality``, ``measure.cost`` and ``measure.scorecard``.
"""
