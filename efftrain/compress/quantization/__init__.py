"""Post-training quantisation: rounding to nearest, GPTQ, AWQ, and mixed precision under a budget of bytes.

It may import ``compress.layerwise``.
"""
