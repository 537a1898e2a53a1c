"""Norms by the largest magnitude, and rotary frequencies that are lower the lower they were."""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from efftrain.models.components import NormConfig
from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.positions import Rotary
from efftrain.models.rope_scaling import RopeScaling
from efftrain.train.config import Training
from efftrain.train.loop import TrainResult, fit
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.run.directory import Run
from efftrain.train.schedules import WarmupStableDecay


@dataclass(frozen=True, kw_only=True)
class Largest(NormConfig):
    def build(self, size, *, eps, axis="norm", units=None):
        return LargestNorm(size, axis)


class LargestNorm(nnx.Module):
    def __init__(self, size, axis):
        self.scale = nnx.Param(np.ones(size, np.float32), axes=(axis,))

    def __call__(self, x):
        return (x / abs(x).max(-1, keepdims=True) * self.scale[...]).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Squared(RopeScaling):
    def scaled(self, frequencies_r, theta, max_length):
        return frequencies_r**2, 1.0


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig
    training: Training


block = BlockConfig(
    attention=Attention(n_heads=4, n_kv_heads=2, d_head=8, n_blocks=1, position=Rotary(scaling=Squared())),
    mlp=Dense(d_ff=32),
)
config = Config(
    model=ModelConfig(vocab_size=32, d_model=16, pattern=(block,), n_repeats=2, max_length=24, norm=Largest()),
    training=Training(
        steps=4,
        batch_size=4,
        length=16,
        optimizer=AdamW(peak_lr=1e-2),
        schedule=WarmupStableDecay(),
        checkpoint_every=2,
    ),
)


class Rows:
    """The same rows in every step, each of two documents."""

    def __next__(self):
        tokens = np.random.default_rng(0).integers(0, 32, (4, 17)).astype(np.int32)
        segments = np.repeat([1, 2], [6, 10])[None].repeat(4, 0).astype(np.int32)
        positions = np.r_[:6, :10][None].repeat(4, 0).astype(np.int32)
        rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions}
        return rows | {"mask": segments > 0}

    def get_state(self):
        return None

    def set_state(self, state):
        pass


def main(out: Path) -> TrainResult:
    run = Run(out, config, script=Path(__file__))

    def build(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config.model, rngs=rngs)

    return fit(build, next_token_loss, Rows(), config.training, run, devices=jax.devices()[:1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
