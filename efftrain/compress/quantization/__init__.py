"""Post-training quantisation: round to nearest (RTN), GPTQ, AWQ, and mixed precision under a budget of bytes.

It may import ``compress.layerwise``.
"""
