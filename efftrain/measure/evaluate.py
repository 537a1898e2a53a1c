"""Bits per byte on held-out text: the one quality figure that compares models with different tokenizers."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError, CorpusError
from efftrain.models.decoder import Decoder
from efftrain.progress import Progress
from efftrain.train.objective import Batch, next_token_loss

SHOW_AFTER_S = 2.0  # a shorter evaluation shows no progress
NumpyBatch = Mapping[str, np.ndarray]


class Evaluator:
    """A model's bits per byte (and nats per token) on a fixed set of rows.

    Bits per byte are the nats of all counted targets / ln 2 / the bytes of text that these targets stand for. Special
    tokens have nats and no bytes: a model pays for the ends of documents.

    Compiled once for each shape of batch and model, whatever the parameters. Works in one process.

    Args:
      batches: starts a fresh pass over the rows; a batch has ``tokens``, ``targets``, ``segments``, ``positions``:
        (batch, length) int32, and ``mask``: bool, False where the target does not count. A last batch that is filled up
        with rows of mask False avoids compiling another shape.
      token_bytes: (tokenizer's vocabulary,) int32, bytes of text of each token, 0 for special tokens.
      max_batches: stop after so many. None: all.
    """

    def __init__(
        self, batches: Callable[[], Iterable[NumpyBatch]], token_bytes: np.ndarray, *, max_batches: int | None = None
    ):
        if max_batches is not None and max_batches < 1:
            raise ConfigError(f"evaluation.max_batches is {max_batches}; it must be at least 1, or None for all")
        self._batches, self._token_bytes, self._max_batches = batches, np.asarray(token_bytes, np.int64), max_batches

    def __call__(self, model: Decoder) -> dict[str, float]:
        """``bpb`` in bits per byte, ``loss`` in nats per target.

        Raises:
          CorpusError: the rows have no target that stands for text.
          ConfigError: a target is outside of the tokenizer's vocabulary.
        """
        graph, state = nnx.split(model)
        nats, n_targets, n_bytes = 0.0, 0, 0
        pending = None
        for batch in _show(itertools.islice(self._batches(), self._max_batches), self._max_batches):
            dispatched = batch_nats(graph, state, dict(batch))
            targets = np.asarray(batch["targets"])[np.asarray(batch["mask"])]
            n_targets += len(targets)
            n_bytes += self._bytes(targets)
            # One batch late: the device works on this one while the host waits for the one before.
            nats += 0.0 if pending is None else float(pending)
            pending = dispatched
        if not n_bytes:
            raise CorpusError(
                "the evaluation rows have no target that stands for text; give a validation split that is not empty"
            )
        nats += float(pending)
        return {"bpb": nats / math.log(2) / n_bytes, "loss": nats / n_targets}

    def _bytes(self, targets: np.ndarray) -> int:
        largest = targets.max(initial=0)
        if largest >= len(self._token_bytes):
            raise ConfigError(
                f"an evaluation target is token {largest} and token_bytes has {len(self._token_bytes)} entries; "
                "take both from the same tokenizer"
            )
        return int(self._token_bytes[targets].sum())


@partial(jax.jit, static_argnums=0)
def batch_nats(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> Array:
    """Sum of the nats of a batch's counted targets, () float32."""
    return next_token_loss(nnx.merge(graph, state), batch, jax.random.key(0))[0]


def _show(batches: Iterable[NumpyBatch], total: int | None) -> Iterator[NumpyBatch]:
    """Yields the batches, under a progress line from the moment that it takes long."""
    start = time.monotonic()
    progress = None
    with ExitStack() as stack:
        for number, batch in enumerate(batches, start=1):
            yield batch
            if progress is not None:
                progress.advance()
            elif time.monotonic() - start > SHOW_AFTER_S:
                progress = stack.enter_context(Progress("evaluate", total, unit="batches", initial=number))
