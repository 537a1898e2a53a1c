"""A fork: its own feed-forward part, in the script itself. Started by test_run.py."""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efftrain.models.config import Attention, BlockConfig, MlpConfig, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.linear import Linear
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.config import Training
from efftrain.train.loop import fit
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.run.directory import Run


class Squared(nnx.Module):
    def __init__(self, d_model: int, d_ff: int, *, dtype, rngs):
        self.up = Linear(d_model, d_ff, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = Linear(d_ff, d_model, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x_btd):
        return self.down(jax.nn.relu(self.up(x_btd)) ** 2), {}


@dataclass(frozen=True, kw_only=True)
class SquaredConfig(MlpConfig):
    d_ff: int

    def build(self, d_model, *, n_layers, dtype, rngs):
        return Squared(d_model, self.d_ff, dtype=dtype, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig
    training: Training


class Ones:
    def __next__(self):
        ones = np.ones((8, 8), np.int32)
        return {"tokens": ones, "targets": ones, "segments": ones, "positions": ones, "mask": ones > 0}

    def get_state(self):
        return None

    def set_state(self, state):
        pass


def main(out: Path) -> None:
    attention = Attention(n_heads=2, n_kv_heads=2, d_head=4, n_blocks=1)
    block = BlockConfig(attention=attention, mlp=SquaredConfig(d_ff=16))
    config = Config(
        model=ModelConfig(vocab_size=10, d_model=8, pattern=(block,), n_repeats=1, max_length=8),
        training=Training(steps=2, batch_size=8, length=8, mesh=MeshConfig(fsdp=4, tensor=2)),
    )
    fitted = fit(
        lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss, Ones(), config.training, Run(out, config)
    )
    np.save(out / "logits.npy", fitted.model(jnp.arange(8)[None]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
