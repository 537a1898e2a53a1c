"""The dense feed-forward part of a block."""

import jax
from flax import nnx
from jax import Array

from efftrain.models.linear import Linear
from efftrain.sharding.rules import constrain


class SwiGLU(nnx.Module):
    """A SwiGLU feed-forward part: ``down(silu(gate(x)) * up(x))`` on (batch, length, d_model)."""

    def __init__(self, d_model: int, d_ff: int, *, n_layers: int, dtype: str, rngs: nnx.Rngs):
        into, out = ("embed", "mlp"), ("mlp", "embed")
        self.gate = Linear(d_model, d_ff, axes=into, dtype=dtype, rngs=rngs)
        self.up = Linear(d_model, d_ff, axes=into, dtype=dtype, rngs=rngs)
        self.down = Linear(d_ff, d_model, axes=out, dtype=dtype, rngs=rngs, gain=(2 * n_layers) ** -0.5)

    def __call__(self, x_btd: Array) -> tuple[Array, dict]:
        hidden_btf = constrain(jax.nn.silu(self.gate(x_btd)) * self.up(x_btd), "batch", "length", "mlp")
        return self.down(hidden_btf), {}
