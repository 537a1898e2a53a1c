"""Flax NNX modules: plain pytrees, no nnx transform anywhere."""
