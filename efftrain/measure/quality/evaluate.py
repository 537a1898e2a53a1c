"""Bits per byte on held-out text: the one quality figure that compares models with different tokenizers."""

import itertools
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from efftrain.errors import ConfigError, CorpusError
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import RoutedDepthConfig, causally_routed, has_routed_depth, routes_causally
from efftrain.ops import counts
from efftrain.progress import Progress
from efftrain.sharding import hosts
from efftrain.sharding.rules import activation_axes
from efftrain.train.objectives.objective import Batch, next_token_loss
from efftrain.train.supervision.interruption import end_if_asked

SHOW_AFTER_S = 2.0  # a shorter evaluation shows no progress
_BASE, _FRACTION = 256, 3  # of the digits of bytes per token
NumpyBatch = Mapping[str, np.ndarray]


class Evaluator:
    """A model's bits per byte (and nats per token) on a fixed set of rows.

    Bits per byte are the nats of all counted targets / ln 2 / the bytes of text that these targets stand for. Special
    tokens have nats and no bytes: a model pays for the ends of documents.

    A model that drops tokens because of others (``MlpConfig.independent_tokens``) is evaluated as it is; its figures
    then depend on which rows are in a batch together, and on how many.

    Compiled once for each shape of batch and model, whatever the parameters. Of several processes each gives its part
    of every batch (``train.loop.batch_part``), within the ``fit`` that trains the model, and all get the same figures.

    Args:
      batches: starts a fresh pass over the rows; a batch has ``tokens``, ``targets``, ``segments``, ``positions``:
        (batch, length) int32, and ``mask``: bool, False where the target does not count. A last batch that is filled up
        with rows of mask False avoids compiling another shape.
      token_bytes: (tokenizer's vocabulary,) bytes of text of each token, 0 for special tokens:
        ``Corpus.token_bytes`` of the split that the rows are of.
      max_batches: stop after so many. None: all.
    """

    def __init__(
        self, batches: Callable[[], Iterable[NumpyBatch]], token_bytes: np.ndarray, *, max_batches: int | None = None
    ):
        if max_batches is not None and max_batches < 1:
            raise ConfigError(f"evaluation.max_batches is {max_batches}; it must be at least 1, or None for all")
        self._batches, self._max_batches = batches, max_batches
        self._byte_digits_kv = byte_digits(token_bytes)

    def __call__(self, model: Decoder) -> dict[str, float]:
        """``bpb`` in bits per byte, ``loss`` in nats per target.

        A model of routed depth is evaluated as it decodes, with ``mean_depth`` in layers a token, and beside it as it
        was trained, looking ahead: ``bpb_look_ahead``, ... One that cannot decode has these alone.

        Raises:
          CorpusError: the rows have no target that stands for text.
          ConfigError: a target is outside of the tokenizer's vocabulary.
        """
        if not has_routed_depth(model):
            return self._evaluate(model)
        ahead = {f"{name}_look_ahead": value for name, value in self._evaluate(model).items()}
        return ahead | (self._evaluate(causally_routed(model)) if routes_causally(model) else {})

    def _evaluate(self, model: Decoder) -> dict[str, float]:
        graph, state = nnx.split(model)
        total = np.zeros(4 + 3 * len(self._byte_digits_kv))  # float64: exact for the counts of any split
        pending = total
        batches = self._batches()
        known = [n for n in (operator.length_hint(batches), self._max_batches) if n]
        for batch in _show(itertools.islice(batches, self._max_batches), min(known, default=None)):
            self._check(batch)
            dispatched = batch_nats(graph, state, _place(batch), self._byte_digits_kv)
            end_if_asked()
            # One batch late: the device works on this one while the host waits for the one before.
            total += np.asarray(pending, np.float64)
            pending = dispatched
        nats, n_targets, passes, n_tokens, *digits = total + np.asarray(pending, np.float64)
        sums_k = np.reshape(digits, (-1, 3)) @ counts.WEIGHTS
        n_bytes = sum(digit / _BASE**place for place, digit in enumerate(sums_k))
        if not n_bytes:
            raise CorpusError(
                "the evaluation rows have no target that stands for text; give a validation split that is not empty"
            )
        found = {"bpb": nats / math.log(2) / n_bytes, "loss": nats / n_targets}
        routed = sum(isinstance(block.depth, RoutedDepthConfig) for block in model.config.layers)
        if n_tokens:
            found["mean_depth"] = model.config.n_layers - routed + routed * passes / n_tokens
        return {name: float(value) for name, value in found.items()}

    def _check(self, batch: NumpyBatch) -> None:
        largest = np.asarray(batch["targets"])[np.asarray(batch["mask"])].max(initial=0)
        if largest >= self._byte_digits_kv.shape[1]:
            raise ConfigError(
                f"an evaluation target is token {largest} and token_bytes has {self._byte_digits_kv.shape[1]} entries; "
                "take both from the same tokenizer"
            )


def byte_digits(token_bytes: np.ndarray) -> np.ndarray:
    """(digits, vocabulary) int32: the whole bytes of each token, then the digits of the fraction to base 256.

    Their sums over a batch are exact in int32, where those of float32 are not; whole numbers have no further digits.
    """
    if np.issubdtype(np.asarray(token_bytes).dtype, np.integer):
        return np.asarray(token_bytes, np.int32)[None]
    parts = np.rint(np.asarray(token_bytes, np.float64) * _BASE**_FRACTION).astype(np.int64)
    digits = [parts >> 8 * _FRACTION, *(parts >> 8 * place & _BASE - 1 for place in reversed(range(_FRACTION)))]
    return np.stack(digits).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def batch_nats(graph: nnx.GraphDef, state: nnx.State, batch: Batch, byte_digits_kv: Array) -> tuple[Array, ...]:
    """Of a batch's counted targets: the sum of their nats, () float32, and their number, () int32.

    Then, of routed depth, the layers that tokens passed in a routed block, and the number of such tokens; else zeros.
    At the end the sums of each of the targets' ``byte_digits``, three () int32 each: see ``ops.counts``.
    """
    metrics = next_token_loss(nnx.merge(graph, state), batch, None)[2]
    digits_kb = jnp.where(batch["mask"], byte_digits_kv[:, batch["targets"]], 0).sum(-1)
    counts_k3 = jax.vmap(counts.total)(digits_kb)
    passes, n_tokens = metrics.get("depth/passes", (0.0, 0.0))
    return metrics["loss"][0], batch["mask"].sum(dtype=jnp.int32), passes, n_tokens, *counts_k3.reshape(-1)


def _place(batch: NumpyBatch) -> Batch:
    """This process's rows as parts of global arrays; as they are where there is one process."""
    if hosts.process_count() == 1:
        return dict(batch)
    spec = PartitionSpec(activation_axes("batch") or None, activation_axes("length") or None)
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    n_rows, length = batch["targets"].shape
    shape = n_rows * hosts.part_of_rows(sharding, (sharding.mesh.size, length))[1], length
    return {name: jax.make_array_from_process_local_data(sharding, rows, shape) for name, rows in batch.items()}


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
