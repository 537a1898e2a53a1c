"""Pruning of weights: one-shot pruning layer by layer, and pruning during training by an optax wrapper with masks.

It may import ``compress.layerwise``.
"""
