"""The layerwise pipeline: a model taken apart into layers, calibration statistics, and the second-order solver.

It imports no other folder of ``compress``.
"""
