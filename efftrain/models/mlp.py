"""The dense feed-forward part of a block."""

from functools import partial
from typing import Literal

import jax
from flax import nnx
from jax import Array

from efftrain.models.linear import Linear
from efftrain.moved import old_names
from efftrain.sharding.rules import constrain

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

__getattr__ = old_names(__name__)


class FeedForward(nnx.Module):
    """A feed-forward part on (batch, length, d_model); by default SwiGLU, ``down(silu(gate(x)) * up(x))``.

    Args:
      d_model, d_ff: sizes of the input and of the hidden layer.
      n_layers: number of layers of the model, for the initial size of the output.
      dtype: dtype of the products.
      activation: the function of ``gate(x)``.
      gated: True: as above. False: ``down(activation(up(x)))``.
      bias: all products have a learned bias.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        n_layers: int,
        dtype: str,
        rngs: nnx.Rngs,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
    ):
        self.activation, self.gated = activation, gated
        into = partial(Linear, d_model, d_ff, axes=("embed", "mlp"), dtype=dtype, rngs=rngs, bias=bias)
        if gated:
            self.gate = into()
        self.up = into()
        self.down = Linear(
            d_ff, d_model, axes=("mlp", "embed"), dtype=dtype, rngs=rngs, gain=(2 * n_layers) ** -0.5, bias=bias
        )

    def __call__(self, x_btd: Array) -> tuple[Array, dict]:
        activate = ACTIVATIONS[self.activation]
        hidden_btf = activate(self.gate(x_btd)) * self.up(x_btd) if self.gated else activate(self.up(x_btd))
        return self.down(constrain(hidden_btf, "batch", "length", "mlp")), {}
