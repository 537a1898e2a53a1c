"""Which depth a model can be decoded with: exits, speculation, the risk that is stated.

It may import ``measure.quality``, ``measure.cost`` and ``measure.scorecard``.
"""
