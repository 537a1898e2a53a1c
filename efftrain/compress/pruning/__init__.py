"""Pruning: at once, layer by layer, or during training with masks in an optax wrapper.

It may import ``compress.layerwise``.
"""
