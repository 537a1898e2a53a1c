"""Measures the latency of prefill (reading a prompt) and of decoding.

Call it outside of ``sharding.rules.use``, where a batch of 1 need not be divided over devices.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.cache import Cache
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import prefill
from efftrain.models.decoding.sampling import GREEDY, sample
from efftrain.models.decoding.unrolled import unrolled


@dataclass(frozen=True)
class Latency:
    """Times of the runs of one compiled program, after one run to warm up.

    Attributes:
      batch: number of rows that are computed together.
      tokens: number of tokens of each row in a run: read in prefill, generated in decoding.
      rounds_s: wall-clock time of each run in seconds, in order.
      compile_s: time of compilation in seconds; short if the program is in JAX's compilation cache.
    """

    batch: int
    tokens: int
    rounds_s: tuple[float, ...]
    compile_s: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.rounds_s)

    @property
    def spread_s(self) -> float:
        """Difference between the slowest and the fastest run, in seconds."""
        return max(self.rounds_s) - min(self.rounds_s)

    @property
    def s_per_token(self) -> float:
        """Median seconds for one token of every row."""
        return self.median_s / self.tokens

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all rows together, at the median time."""
        return self.batch * self.tokens / self.median_s


def measure_latency(
    model: Decoder, *, batch: int, prompt_length: int, n_new: int, rounds: int = 5
) -> tuple[Latency, Latency]:
    """Measures prefill and greedy decoding, the two halves of ``models.decoding.generate.generate``.

    Prefill ends with the first new token. Decoding starts from the prompt in the cache, which has
    ``prompt_length + n_new`` slots. Each run of the decoding loop splits the stacked layers once; that cost is divided
    between the ``n_new`` tokens.

    Args:
      model: the model.
      batch: number of rows.
      prompt_length: tokens of every prompt.
      n_new: number of tokens that are generated in each row.
      rounds: number of runs of each half.

    Returns:
      The latency of prefill, and that of decoding.

    Raises:
      ConfigError: a size is below 1, or prompt and new tokens together are longer than ``max_length``.
    """
    for name, size in {"batch": batch, "prompt_length": prompt_length, "n_new": n_new, "rounds": rounds}.items():
        if size < 1:
            raise ConfigError(f"latency.{name} is {size}; it must be at least 1")
    if prompt_length + n_new > model.config.max_length:
        raise ConfigError(
            f"latency: prompt and new tokens are {prompt_length + n_new} together and model.max_length is "
            f"{model.config.max_length}; shorten the prompt or generate fewer"
        )
    graph, state = nnx.split(unrolled(model))
    read = (graph, state, _prompts(model, batch, prompt_length), prompt_length + n_new)
    (first_b, cache), prefill_s, prefill_compile_s = _time(_prefill, read, rounds)
    _, decode_s, decode_compile_s = _time(decode, (graph, state, first_b, cache, n_new), rounds)
    prefill_latency = Latency(batch, prompt_length, prefill_s, prefill_compile_s)
    return prefill_latency, Latency(batch, n_new, decode_s, decode_compile_s)


def side_by_side(
    models: Mapping[str, Decoder],
    *,
    batches: Sequence[int] = (1, 8),
    prompt_length: int = 128,
    n_new: int = 64,
    turns: int = 5,
    rounds: int = 3,
) -> dict[str, dict[str, float]]:
    """Latency of several models, which take turns; see ``in_turns``.

    Args:
      models: the models by name.
      batches: batch sizes.
      prompt_length, n_new, rounds: see ``measure_latency``.
      turns: number of turns of each model.

    Returns:
      For each model and batch size B, in seconds: ``prefill_s_bB`` for the prompts, and ``decode_s_per_token_bB``.

    Raises:
      ConfigError: as for ``measure_latency``.
    """

    def latencies(model: Decoder) -> dict[str, float]:
        found = {}
        for batch in batches:
            read, new = measure_latency(model, batch=batch, prompt_length=prompt_length, n_new=n_new, rounds=rounds)
            found |= {f"prefill_s_b{batch}": read.median_s, f"decode_s_per_token_b{batch}": new.s_per_token}
        return found

    return in_turns({name: partial(latencies, model) for name, model in models.items()}, turns)


def in_turns(measure: Mapping[str, Callable[[], Mapping[str, float]]], turns: int) -> dict[str, dict[str, float]]:
    """Medians of repeated measurements that take turns, so that a slow phase of the machine affects all of them.

    Args:
      measure: functions that measure some figures once, by name.
      turns: number of times that each is called.

    Returns:
      The median of each figure, by name.
    """
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in measure}
    for _ in range(turns):
        for name, figures in found.items():
            figures.append(measure[name]())
    return {
        name: {figure: statistics.median(turn[figure] for turn in figures) for figure in figures[0]}
        for name, figures in found.items()
    }


@partial(jax.jit, static_argnums=(0, 4))
def decode(graph: nnx.GraphDef, state: nnx.State, token_b: Array, cache: Cache, n_new: int) -> Array:
    """Decodes ``n_new`` tokens greedily after ``token_b`` and returns the last one, (batch,).

    Args:
      graph, state: the unrolled decoder, split by ``nnx.split``.
      token_b: the tokens to continue, (batch,).
      cache: the cache of the tokens before, with ``n_new`` free slots.
      n_new: number of tokens.
    """
    model = nnx.merge(graph, state)
    layers = model.layers()

    def step(_: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        token_b, cache = carry
        hidden_btd, cache = model.extend(token_b[:, None], cache, layers=layers)
        return _likeliest(model.logits(hidden_btd[:, 0])), cache

    return jax.lax.fori_loop(0, n_new, step, (token_b, cache))[0]


@partial(jax.jit, static_argnums=(0, 3))
def _prefill(graph: nnx.GraphDef, state: nnx.State, prompts_bp: Array, slots: int) -> tuple[Array, Cache]:
    batch, length = prompts_bp.shape
    lengths_b = jnp.full((batch,), length, jnp.int32)
    logits_bv, cache = prefill(nnx.merge(graph, state), prompts_bp, lengths_b, slots=slots)
    return _likeliest(logits_bv), cache


def _likeliest(logits_bv: Array) -> Array:
    return sample(logits_bv, jax.random.key(0), GREEDY)


def _time(program: Any, arguments: tuple[Any, ...], rounds: int) -> tuple[Any, tuple[float, ...], float]:
    """The result, seconds of each round, and seconds of compilation of a jitted program.

    The first and the last of its arguments are static.
    """
    started = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    compile_s = time.perf_counter() - started
    dynamic = arguments[1:-1]
    result = jax.block_until_ready(compiled(*dynamic))  # warm-up
    rounds_s = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*dynamic))
        rounds_s.append(time.perf_counter() - started)
    return result, tuple(rounds_s), compile_s


def _prompts(model: Decoder, batch: int, length: int) -> Array:
    """Random prompts: a routed model would route copies of a single token to the same experts."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length))
    return jnp.asarray(tokens, jnp.int32)
