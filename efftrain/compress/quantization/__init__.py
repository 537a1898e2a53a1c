"""Post-training quantisation: rounding, GPTQ, AWQ, and the choice of formats under a budget.

It may import ``compress.layerwise``.
"""
