"""Structured pruning: importance, the shape of the smaller model, the cut.

It may import ``compress.layerwise``.
"""
