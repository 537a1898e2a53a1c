"""Structured pruning: importance of a model's parts, the shape of the smaller model, and the cut.

It may import ``compress.layerwise``.
"""
