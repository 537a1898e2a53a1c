"""The models as Flax NNX modules, which are used as plain pytrees, without any nnx transform."""
