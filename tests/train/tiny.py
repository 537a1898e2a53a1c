"""The smallest run that is a run: shared by the tests of training, and by the scripts that they start."""

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.config import Training
from efftrain.train.loop import TrainResult, fit
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.run.directory import Run

VOCAB, ROWS, LENGTH = 52, 8, 8
ATTENTION = Attention(n_heads=4, n_kv_heads=4, d_head=4, n_blocks=1)
MODEL = ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    pattern=(BlockConfig(attention=ATTENTION, mlp=Dense(d_ff=32)),),
    n_repeats=2,
    max_length=2 * LENGTH,
    scan=True,  # the shorter compile
)
TRAINING = Training(
    steps=8,
    batch_size=ROWS,
    length=LENGTH,
    optimizer=AdamW(peak_lr=1e-2),
    checkpoint_every=3,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = MODEL
    training: Training = TRAINING
    note: str = "as a recipe would have it"


class Crash(Exception):
    pass


class Walks:
    """Random walks over the vocabulary with unequal padding. Batch i depends on i alone.

    Args:
      pause_s: sleep before each batch.
      spoil: steps (from 1) whose batch ``nan_at_spoiled`` turns into one that is not finite.
      crash_at: the batch in whose place an exception comes.
      kill_self: (batch, signal): this process gets the signal while it makes the batch.
    """

    def __init__(
        self,
        *,
        pause_s: float = 0.0,
        spoil: tuple[int, ...] = (),
        crash_at: int | None = None,
        kill_self: tuple[int, int] | None = None,
    ):
        self.taken = 0
        self._pause_s, self._spoil, self._crash_at, self._kill_self = pause_s, spoil, crash_at, kill_self

    def __next__(self) -> dict[str, np.ndarray]:
        time.sleep(self._pause_s)
        if self.taken + 1 == self._crash_at:
            raise Crash
        self.taken += 1
        if self._kill_self and self._kill_self[0] == self.taken:
            os.kill(os.getpid(), self._kill_self[1])
        batch = walk(self.taken)
        if self.taken in self._spoil:
            batch["positions"] = np.full_like(batch["positions"], SPOILED)
        return batch

    def get_state(self) -> Any:
        return {"taken": self.taken}

    def set_state(self, state: Any) -> None:
        self.taken = state["taken"]


SPOILED = 10_000  # a position that marks a batch for ``nan_at_spoiled``


def walk(number: int) -> dict[str, np.ndarray]:
    rows, length = ROWS, LENGTH
    draw = np.random.default_rng(number)
    text = np.cumsum(draw.integers(0, 3, (rows, length + 1)), axis=1) % VOCAB
    n_real = draw.integers(1, length + 1, (rows, 1))
    places = np.arange(length)
    return {
        "tokens": text[:, :-1].astype(np.int32),
        "targets": text[:, 1:].astype(np.int32),
        "segments": np.ones((rows, length), np.int32),
        "positions": np.tile(places.astype(np.int32), (rows, 1)),
        "mask": places < n_real,
    }


def nan_at_spoiled(model, batch, key):
    """The usual objective; not a number for a spoiled batch."""
    loss, count, metrics = next_token_loss(model, batch, key)
    loss = jnp.where(batch["positions"][0, 0] == SPOILED, jnp.nan, loss)
    return loss, count, metrics | {"loss": (loss, count)}


def train(
    out: Path,
    batches: Any = None,
    *,
    model: ModelConfig = MODEL,
    objective=next_token_loss,
    devices: int = 1,
    evaluate=None,
    initial=None,
    wrap=None,
    **changes,
) -> TrainResult:
    """``fit`` of the tiny run on so many devices, with fields of its ``Training`` changed."""
    config = Config(model=model, training=dataclasses.replace(TRAINING, **changes))
    return fit(
        lambda rngs: Decoder(config.model, rngs=rngs),
        objective,
        Walks() if batches is None else batches,
        config.training,
        Run(out, config),
        evaluate=evaluate,
        initial=initial,
        wrap=wrap,
        devices=jax.devices()[:devices],
    )


def numbers(out: Path) -> list[tuple]:
    """What must not change when a run is broken and continued, row by row; the times may."""
    names = ("step", "loss", "grad_norm", "lr", "skipped")
    return [tuple(row[name] for name in names) for row in read_metrics(out)]


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in flatten(nnx.state(model)).items()}


def assert_same_parameters(model: nnx.Module, other: nnx.Module, atol: float = 0.0) -> None:
    got, want = parameters(model), parameters(other)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=atol, err_msg=name)


def environment(devices: int = 1) -> dict[str, str]:
    """Of a subprocess with so many fake devices."""
    flags = " ".join(f for f in os.environ.get("XLA_FLAGS", "").split() if "force_host_platform_device_count" not in f)
    return os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip()}
