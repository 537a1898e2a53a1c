"""Experts by a hash of the token. Roller et al. 2021 (hash layers), section 3.1."""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from efftrain.models.components import RouterConfig
from efftrain.models.config import Attention, BlockConfig, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.moe import MoE
from efftrain.ops.routing import Routing
from efftrain.train.config import Training
from efftrain.train.loop import TrainResult, fit
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.run.directory import Run
from efftrain.train.schedules import WarmupStableDecay


@dataclass(frozen=True, kw_only=True)
class Hash(RouterConfig):
    def build(self, moe, d_model, *, rngs):
        return HashRouter(moe.n_experts)


class HashRouter(nnx.Module):
    def __init__(self, n_experts):
        self.n_experts = n_experts

    def __call__(self, x_btd, tokens_bt, bias_e):
        experts_nk = tokens_bt.reshape(-1, 1) * 7919 % 31 % self.n_experts
        chosen_ne = jax.nn.one_hot(experts_nk[:, 0], self.n_experts)
        return Routing(experts_nk, jax.numpy.ones(experts_nk.shape), chosen_ne)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig
    training: Training


block = BlockConfig(
    attention=Attention(n_heads=4, n_kv_heads=2, d_head=8, n_blocks=1),
    mlp=MoE(n_experts=4, top_k=1, d_expert=32, router=Hash()),
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
