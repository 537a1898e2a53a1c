"""The layerwise pipeline: a model taken apart, calibration hooks, the second-order solver.

It imports no other folder of ``compress``.
"""
