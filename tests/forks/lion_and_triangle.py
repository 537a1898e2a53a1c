"""An optimizer and a schedule of its own: Lion (Chen et al. 2023), and a rate that rises and falls linearly."""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.train.config import Training
from efftrain.train.loop import TrainResult, fit
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.optimizers import OptimizerConfig
from efftrain.train.run.directory import Run
from efftrain.train.schedules import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class Lion(OptimizerConfig):
    beta: float = 0.9

    def build(self, factor):
        return optax.lion(lambda step: self.peak_lr * factor(step), b1=self.beta)


@dataclass(frozen=True, kw_only=True)
class Triangle(ScheduleConfig):
    def build(self, n_steps):
        return lambda step: 1 - abs(2 * (step + 1) / n_steps - 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig
    training: Training


block = BlockConfig(
    attention=Attention(n_heads=4, n_kv_heads=2, d_head=8, n_blocks=1),
    mlp=Dense(d_ff=32),
)
config = Config(
    model=ModelConfig(vocab_size=32, d_model=16, pattern=(block,), n_repeats=2, max_length=24),
    training=Training(
        steps=4,
        batch_size=4,
        length=16,
        optimizer=Lion(peak_lr=1e-2),
        schedule=Triangle(),
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
