"""Attention and feed-forward part side by side (GPT-J, PaLM), in every second block for half of the tokens."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from efftrain.models.block import Block
from efftrain.models.components import ResidualConfig
from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths
from efftrain.train.config import Training
from efftrain.train.loop import TrainResult, fit
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.run.directory import Run
from efftrain.train.schedules import WarmupStableDecay


@dataclass(frozen=True, kw_only=True)
class Parallel(ResidualConfig):
    def build(self, block, model, *, rngs):
        return ParallelBlock(block, model, rngs=rngs)


class ParallelBlock(Block):
    def join(self, x_btd, attended_btd, tokens_bt, segments_bt):
        out_btd, metrics = self.feed_forward(self.mlp_norm(x_btd), tokens_bt, segments_bt)
        return x_btd + attended_btd + out_btd, metrics


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig
    training: Training


block = BlockConfig(
    attention=Attention(n_heads=4, n_kv_heads=2, d_head=8, n_blocks=1),
    mlp=Dense(d_ff=32),
    residual=Parallel(),
)
routed = replace(block, depth=MixtureOfDepths(capacity=0.5, room=2.0))
config = Config(
    model=ModelConfig(vocab_size=32, d_model=16, pattern=(block, routed), n_repeats=1, max_length=24),
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
