"""One narrow vector of a token is its key and its value for all heads, and all that is cached."""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from efftrain.models import attention, cache, linear
from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.ops import attention as ops
from efftrain.train.config import Training
from efftrain.train.loop import TrainResult, fit
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.run.directory import Run
from efftrain.train.schedules import WarmupStableDecay


@dataclass(frozen=True, kw_only=True)
class Latent(Attention):
    quantizes_cache = False

    def build(self, model, *, rngs):
        return LatentAttention(self, model.d_model, {"dtype": model.dtype, "rngs": rngs})

    def empty_cache(self, model, batch, slots):
        return cache.empty_slots(model, batch, 1, slots, self.d_head)


class LatentAttention(attention.AttentionModule):
    def __init__(self, config, d_model, how):
        self.query = linear.Linear(d_model, config.n_heads * config.d_head, axes=("embed", "heads"), **how)
        self.latent = linear.Linear(d_model, config.d_head, axes=("embed", None), **how)
        self.out = linear.Linear(config.n_heads * config.d_head, d_model, axes=("heads", "embed"), **how)

    def __call__(self, x, positions, segments=None):
        return self.attend(ops.causal_attention, x, self.latent(x)[:, :, None], segments_bs=segments)

    def write_cache(self, x, positions, stored, slots=None):
        return cache.store_tokens(stored, self.latent(x)[:, :, None], positions, slots)

    def attend_cached(self, x, positions, stored, slots=None):
        return self.attend(ops.cached_attention, x, stored, positions_bt=positions if slots is None else slots)

    def attend(self, function, x, stored, **where):
        q_bthd = self.query(x).reshape(*x.shape[:2], -1, stored.shape[-1])
        return self.out(function(q_bthd, stored, stored, **where).reshape(x.shape[0], x.shape[1], -1))


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig
    training: Training


block = BlockConfig(
    attention=Latent(n_heads=4, n_kv_heads=2, d_head=8, n_blocks=1),
    mlp=Dense(d_ff=32),
)
config = Config(
    model=ModelConfig(vocab_size=32, d_model=16, pattern=(block,), n_repeats=2, max_length=24),
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
