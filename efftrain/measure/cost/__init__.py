"""What a model costs: parameters, bytes, FLOPs, latency, memory, a mesh by formulas.

It imports no other folder of ``measure``.
"""
