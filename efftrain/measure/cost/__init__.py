"""The cost of a model: parameters, bytes, FLOPs, latency, memory, and the estimate of a mesh by formulas.

It imports no other folder of ``measure``.
"""
