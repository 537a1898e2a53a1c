"""Measures the speed-up of self-speculative decoding, in which the first layers of a model draft tokens."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import AllLayers, decode_tokens, read_prompts
from efftrain.models.decoding.sampling import GREEDY
from efftrain.models.decoding.self_speculation import SelfSpeculation, extra_slots, speculate
from efftrain.models.decoding.unrolled import unrolled


def measure_speculation(
    model: Decoder, prompts: Sequence[np.ndarray], speculation: SelfSpeculation, n_new: int, rounds: int = 1
) -> dict[str, Any]:
    """Times self-speculative and plain greedy decoding alternately on the same prompts, without the prefill.

    Args:
      model: the model.
      prompts: tokens of each prompt, (batch, length) int32, without padding.
      speculation: the layer that drafts and the length of a draft.
      n_new: number of tokens that are generated after each prompt.
      rounds: number of rounds over all prompts.

    Returns:
      The fields of ``speculation`` and: ``speedup``, the median over prompts and rounds of plain time over speculative
      time; ``tokens_per_s`` and ``plain_tokens_per_s`` of a row; ``acceptance``, the share of the drafted tokens that
      were accepted; and whether all tokens were ``identical``.
    """
    graph, state = nnx.split(unrolled(model))
    key = jax.random.key(0)
    times, identical, accepted, drafted = [], True, 0, 0
    for number, prompt in enumerate([*prompts] * rounds):
        lengths = np.full(len(prompt), prompt.shape[1], np.int32)
        first, cache = read_prompts(graph, state, prompt, lengths, key, n_new + extra_slots(speculation), GREEDY)
        plain = partial(
            decode_tokens, graph, state, first, cache, key, n_new, GREEDY, AllLayers(), None, 0.0, None, None
        )
        drafting = partial(speculate, graph, state, first, cache, key, n_new, GREEDY, speculation)
        if number == 0:
            jax.block_until_ready((plain(), drafting()))
        (tokens, *_), plain_s = timed(plain)
        found, s = timed(drafting)
        times.append((plain_s, s))
        identical &= bool((np.asarray(tokens) == np.asarray(found.tokens_bn)).all())
        accepted, drafted = accepted + int(found.accepted_b.sum()), drafted + int(found.drafted_b.sum())
    n_decoded = n_new - 1  # the first token comes from the prefill
    return asdict(speculation) | {
        "speedup": statistics.median(p / s for p, s in times),
        "tokens_per_s": n_decoded / statistics.median(s for _, s in times),
        "plain_tokens_per_s": n_decoded / statistics.median(p for p, _ in times),
        "acceptance": accepted / max(drafted, 1),
        "identical": identical,
    }


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Runs a program, waits for its result, and returns the result and the seconds that it took."""
    started = time.perf_counter()
    found = jax.block_until_ready(run())
    return found, time.perf_counter() - started
