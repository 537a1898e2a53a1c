"""Evaluation in bits per byte on held-out text, a figure that compares models with different tokenizers."""

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

SHOW_AFTER_S = 2.0  # seconds after which a progress bar appears
_BASE, _FRACTION = 256, 3  # base of the digits of bytes per token, and number of digits after the point
NumpyBatch = Mapping[str, np.ndarray]


class Evaluator:
    """Evaluates a model's bits per byte and nats per token on a fixed set of rows.

    Bits per byte are the nats of all counted targets / ln 2 / the bytes of text of these targets. Special tokens have
    nats but no bytes, so that the ends of documents cost a model bits.

    A model that drops tokens depending on other tokens (``MlpConfig.independent_tokens`` is False) is evaluated in the
    same way; its figures then depend on which and how many rows are in a batch together.

    The program is compiled once for each shape of batch and model. With several processes, each gives its part of every
    batch (``train.batches.batch_part``) within the ``fit`` that trains the model, and all get the same figures.

    Args:
      batches: starts a new pass over the rows. A batch has ``tokens``, ``targets``, ``segments`` and ``positions``,
        (batch, length) int32, and ``mask``, bool, False where the target does not count. Fill up the last batch with
        rows of mask False to avoid compiling another shape.
      token_bytes: (vocabulary of the tokenizer,) bytes of text of each token, 0 for special tokens;
        ``Corpus.token_bytes`` of the split of the rows.
      max_batches: maximum number of batches. None: all.
    """

    def __init__(
        self, batches: Callable[[], Iterable[NumpyBatch]], token_bytes: np.ndarray, *, max_batches: int | None = None
    ):
        if max_batches is not None and max_batches < 1:
            raise ConfigError(f"evaluation.max_batches is {max_batches}; it must be at least 1, or None for all")
        self._batches, self._max_batches = batches, max_batches
        self._byte_digits_kv = byte_digits(token_bytes)

    def __call__(self, model: Decoder) -> dict[str, float]:
        """Evaluates a model.

        Returns:
          ``bpb`` in bits per byte and ``loss`` in nats per target. A model with routed depth is evaluated with the
          causal routing of decoding, which also gives ``mean_depth`` in layers per token, and a second time with the
          routing of training, which looks ahead: ``bpb_look_ahead``, ``loss_look_ahead``, ... A model that cannot route
          causally has only the latter figures.

        Raises:
          CorpusError: no target of the rows has any text.
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
            # The sums are read one batch late, so that the device works on this batch meanwhile.
            total += np.asarray(pending, np.float64)
            pending = dispatched
        nats, n_targets, passes, n_tokens, *digits = total + np.asarray(pending, np.float64)
        sums_k = np.reshape(digits, (-1, 3)) @ counts.WEIGHTS
        n_bytes = sum(digit / _BASE**place for place, digit in enumerate(sums_k))
        if not n_bytes:
            raise CorpusError(
                "the evaluation rows contain no text to predict; give a validation split that is not empty"
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
    """Splits the bytes of each token into integers: the whole bytes, then the digits of the fraction to base 256.

    Sums of these integers over a batch are exact in int32, while sums in float32 would not be.

    Args:
      token_bytes: (vocabulary,) integers or floats.

    Returns:
      (digits, vocabulary) int32; integers have only one digit.
    """
    if np.issubdtype(np.asarray(token_bytes).dtype, np.integer):
        return np.asarray(token_bytes, np.int32)[None]
    parts = np.rint(np.asarray(token_bytes, np.float64) * _BASE**_FRACTION).astype(np.int64)
    digits = [parts >> 8 * _FRACTION, *(parts >> 8 * place & _BASE - 1 for place in reversed(range(_FRACTION)))]
    return np.stack(digits).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def batch_nats(graph: nnx.GraphDef, state: nnx.State, batch: Batch, byte_digits_kv: Array) -> tuple[Array, ...]:
    """Sums nats, counts and bytes over the counted targets of a batch.

    Returns:
      The sum of the nats of the targets, () float32, and the number of targets, () int32. Then, for routed depth, the
      number of layers that tokens passed in routed blocks, and the number of such tokens; otherwise zeros. Then, for
      each of the ``byte_digits``, its sum over the targets as three () int32; see ``ops.counts``.
    """
    metrics = next_token_loss(nnx.merge(graph, state), batch, None)[2]
    digits_kb = jnp.where(batch["mask"], byte_digits_kv[:, batch["targets"]], 0).sum(-1)
    counts_k3 = jax.vmap(counts.total)(digits_kb)
    passes, n_tokens = metrics.get("depth/passes", (jnp.float32(0), jnp.float32(0)))
    return metrics["loss"][0], batch["mask"].sum(dtype=jnp.int32), passes, n_tokens, *counts_k3.reshape(-1)


def _place(batch: NumpyBatch) -> Batch:
    """Makes global arrays of the rows of all processes; with a single process the rows stay as they are."""
    if hosts.process_count() == 1:
        return dict(batch)
    spec = PartitionSpec(activation_axes("batch") or None, activation_axes("length") or None)
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    n_rows, length = batch["targets"].shape
    shape = n_rows * hosts.part_of_rows(sharding, (sharding.mesh.size, length))[1], length
    return {name: jax.make_array_from_process_local_data(sharding, rows, shape) for name, rows in batch.items()}


def _show(batches: Iterable[NumpyBatch], total: int | None) -> Iterator[NumpyBatch]:
    """Yields the batches, with a progress bar once the evaluation has taken ``SHOW_AFTER_S``."""
    start = time.monotonic()
    progress = None
    with ExitStack() as stack:
        for number, batch in enumerate(batches, start=1):
            yield batch
            if progress is not None:
                progress.advance()
            elif time.monotonic() - start > SHOW_AFTER_S:
                progress = stack.enter_context(Progress("evaluate", total, unit="batches", initial=number))
