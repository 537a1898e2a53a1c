"""Few-shot scoring: a model that was not trained on a task reads examples and scores the name of each label."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efftrain.data.storage.tokenizer import find_end_of_text
from efftrain.errors import ConfigError
from efftrain.models.cache import Cache
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import prefill
from efftrain.models.decoding.unrolled import unrolled
from efftrain.ops.cross_entropy import token_nll

NO_CONTENT = "N/A"  # the question without content that measures the prior of the labels
_BUCKET = 32  # prompts are padded to a multiple of this number of tokens, so that few shapes are compiled


@dataclass(frozen=True)
class FewShot:
    """Scores of the labels for each text, and the size of the prompt.

    Attributes:
      logits_nl: (n, labels), log likelihood of a label's name after the prompt and the question, minus that after the
        prompt and a question without content.
      shots: number of examples in the prompt: as many as were asked for, or as fit.
      prompt_tokens: number of tokens of the prompt with the examples.
      latency_s: median time for one text, in which the examples are read again, in seconds.
    """

    logits_nl: np.ndarray
    shots: int
    prompt_tokens: int
    latency_s: float


def few_shot(
    model: Decoder,
    tokenizer,
    shown: Sequence[tuple[str, str]],
    labels: Sequence[str],
    texts: Sequence[str],
    *,
    shots: int,
    end_of_text: str | None = None,
) -> FewShot:
    """Scores every label for every text by its in-context likelihood, calibrated by the prior of the labels.

    Args:
      model: a language model.
      tokenizer: the tokenizer of the model.
      shown: (text, label) pairs; the first ones that fit are the examples.
      labels: the labels of the task; their names are read as words.
      texts: the texts to score.
      shots: maximum number of examples.
      end_of_text: the token before the prompt. None: the one that ``find_end_of_text`` finds.

    Raises:
      ConfigError: a text with a label is longer than ``max_length``, even without examples.

    Source: contextual calibration by a question without content, Zhao et al. 2021.
    """
    names = [tokenizer.encode(f" {words(label)}\n", add_special_tokens=False).ids for label in labels]
    queries = [_asked(tokenizer, text) for text in (NO_CONTENT, *texts)]
    most = model.config.max_length
    room = most - max(map(len, queries)) - max(map(len, names)) - 1
    if room < 0:
        raise ConfigError(
            f"a question and a label do not fit into the {most} tokens of the model; remove the long ones"
        )
    prompt, n_shown = [tokenizer.token_to_id(find_end_of_text(tokenizer, end_of_text))], 0
    for text, label in shown[:shots]:
        more = [*_asked(tokenizer, text), *tokenizer.encode(f" {words(label)}\n\n", add_special_tokens=False).ids]
        if len(prompt) - 1 + len(more) > room:
            break
        prompt, n_shown = prompt + more, n_shown + 1
    graph, state = nnx.split(unrolled(model))
    longest = max(map(len, names))
    names_lt = np.array([name + [0] * (longest - len(name)) for name in names], np.int32)
    lengths_l = np.array([len(name) for name in names], np.int32)
    scores, times = [], []
    for query in queries:
        read = prompt + query
        padded = np.zeros((1, min(-(-len(read) // _BUCKET) * _BUCKET, most)), np.int32)
        padded[0, : len(read)] = read
        started = time.perf_counter()
        scores.append(np.asarray(_likelihoods(graph, state, padded, np.array([len(read)]), names_lt, lengths_l)))
        times.append(time.perf_counter() - started)
    return FewShot(np.stack(scores[1:]) - scores[0], n_shown, len(prompt), statistics.median(times))


def words(label: str) -> str:
    """The name of a label as words: ``card_arrival`` becomes ``card arrival``."""
    return label.replace("_", " ").strip()


def _asked(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(f"Question: {text}\nLabel:", add_special_tokens=False).ids


@partial(jax.jit, static_argnums=0)
def _likelihoods(graph, state, prompt_1p: Array, length_1: Array, names_lt: Array, lengths_l: Array) -> Array:
    """Log likelihood of each name after the prompt, (labels,); the prompt is read once for all names."""
    model = nnx.merge(graph, state)
    n_labels, longest = names_lt.shape
    logits_1v, cache = prefill(model, prompt_1p, length_1, slots=prompt_1p.shape[1] + longest)
    shared = jax.tree.map(lambda a: jnp.broadcast_to(a, (n_labels, *a.shape[1:])), cache.layers)
    hidden_ltd, _ = model.extend(names_lt, Cache(shared, jnp.repeat(cache.lengths_b, n_labels)))
    logits_ltv = model.logits(hidden_ltd[:, :-1])
    first_l = token_nll(jnp.broadcast_to(logits_1v, (n_labels, logits_1v.shape[-1])), names_lt[:, 0])
    rest_lt = token_nll(logits_ltv, names_lt[:, 1:])
    valid_lt = jnp.arange(1, longest) < lengths_l[:, None]
    return -(first_l + (rest_lt * valid_lt).sum(1))
