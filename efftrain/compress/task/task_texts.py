"""Data augmentation by a task's teacher: synthetic questions for a label, and answers by majority vote."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from efftrain.compress.task.task import TaskLoss, predict
from efftrain.data.tasks.items import TaskIds, questions
from efftrain.data.tasks.task import same_text
from efftrain.errors import ConfigError
from efftrain.measure.quality.task_scores import log_softmax
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import generate
from efftrain.models.decoding.sampling import GREEDY, Sampling
from efftrain.models.decoding.unrolled import unrolled
from efftrain.progress import Progress

ROWS = 256  # number of texts that are sampled together


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Options for texts that a teacher generates.

    Attributes:
      per_label: number of questions that are sampled for each label.
      temperature: sampling temperature.
      threshold: a question is kept if the teacher gives at least this probability to the label for which it was
        sampled; an answer is kept if at least this share of the samples agrees.
      samples: for tasks that generate: number of answers to each prompt, of which the most frequent one is used.
    """

    per_label: int = 100
    temperature: float = 0.9
    threshold: float = 0.5
    samples: int = 8

    def __post_init__(self):
        for name in ("per_label", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"augment.{name} is {getattr(self, name)}; it must be at least 1")
        if not self.temperature > 0:
            raise ConfigError(
                f"augment.temperature is {self.temperature}; it must be above 0, or all samples are the same"
            )
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"augment.threshold is {self.threshold}; give a share from 0 to below 1")


@dataclass(frozen=True)
class SyntheticQuestions:
    """Synthetic questions of a teacher.

    Attributes:
      texts: the questions that were kept.
      labels: (n,) index of the label for which each question was sampled.
      logits: (n, labels) of the teacher when it reads the questions.
      counts: how many questions were ``drawn`` and ``kept``, and how many were removed: ``cut`` (without an end, not
        text, or too long), ``known``, ``repeated``, ``unsure``.
    """

    texts: list[str]
    labels: np.ndarray
    logits: np.ndarray
    counts: dict[str, int]


def synthesise(
    teacher: Decoder,
    ids: TaskIds,
    loss: TaskLoss,
    options: Augmentation,
    known: Iterable[str],
    *,
    length: int,
    longest: int,
    seed: int,
) -> SyntheticQuestions:
    """Samples questions for each label, and keeps those that are new and that the teacher assigns to that label.

    Args:
      teacher: a model that was also trained on ``conditionals``.
      ids: token ids of the teacher.
      loss: the loss of the task.
      options: how many questions are sampled, and which are kept.
      known: texts that must not occur: those of the test, and those that exist already.
      length: tokens of the rows in which the teacher reads the questions.
      longest: maximum number of tokens of a question.
      seed: seed of the sampling.

    Source: the filter by a second prediction of the same model follows Wang et al. 2022 (self-consistency) and Yoo et
    al. 2021 (GPT3Mix).
    """
    known, counts, found = {same_text(text) for text in known}, Counter(), {}
    wanted = np.repeat(np.arange(len(ids.labels)), options.per_label)
    prompts = np.stack([np.full_like(wanted, ids.end_of_text_id), ids.first_label + wanted], axis=1)
    sampling = Sampling(temperature=options.temperature)
    for tokens, label in zip(_sample(teacher, ids, prompts, longest, sampling, seed), wanted, strict=True):
        counts["drawn"] += 1
        text, problem = _text(ids, tokens), None
        if text is None:
            problem = "cut"
        elif same_text(text) in known:
            problem = "known"
        elif same_text(text) in found:
            problem = "repeated"
        if text is None or problem:
            counts[problem] += 1
        else:
            found[same_text(text)] = (text, label)
    texts, labels = [text for text, _ in found.values()], np.array([label for _, label in found.values()], np.int32)
    items = questions(ids, texts)
    fit = np.array([len(item) <= length for item in items], bool)  # a text may have more tokens than were sampled
    logits = np.zeros((len(texts), loss.n_labels), np.float32)
    if fit.any():
        logits[fit] = predict(teacher, loss, [item for item, f in zip(items, fit, strict=True) if f], length=length)
    sure = fit & (np.exp(log_softmax(logits))[np.arange(len(texts)), labels] >= options.threshold)
    counts["cut"] += int((~fit).sum())
    totals = dict(counts) | {"unsure": int((fit & ~sure).sum()), "kept": int(sure.sum())}
    return SyntheticQuestions([t for t, s in zip(texts, sure, strict=True) if s], labels[sure], logits[sure], totals)


def answer(
    model: Decoder,
    ids: TaskIds,
    prompts: Sequence[str],
    *,
    longest: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[str]:
    """Generates the answer to each prompt; an answer that does not end within ``longest`` tokens is cut there."""
    encoded = [[ids.end_of_text_id, *tokens, ids.answer] for tokens, _ in ids.encode(prompts)]
    sampled = _sample(model, ids, encoded, longest, sampling, seed)
    return [ids.decode(_up_to_end(ids, tokens)) for tokens in sampled]


def agreed_answers(
    model: Decoder, ids: TaskIds, prompts: Sequence[str], options: Augmentation, *, longest: int, seed: int
) -> tuple[list[str | None], dict[str, int]]:
    """Generates several answers to each prompt and takes the most frequent one.

    Returns:
      The answers, None where too few samples agree, and how many prompts were ``asked``, ``unsure`` and ``kept``.

    Source: Wang et al. 2022 (self-consistency).
    """
    sampling = Sampling(temperature=options.temperature)
    several = [text for text in prompts for _ in range(options.samples)]
    sampled = answer(model, ids, several, longest=longest, sampling=sampling, seed=seed)
    found = [
        majority(sampled[i : i + options.samples], options.threshold) for i in range(0, len(sampled), options.samples)
    ]
    n_kept = sum(text is not None for text in found)
    return found, {"asked": len(prompts), "unsure": len(prompts) - n_kept, "kept": n_kept}


def majority(answers: Sequence[str], threshold: float) -> str | None:
    """The most frequent answer, the first one of a tie; None if a smaller fraction agrees, or if it is empty."""
    text, n = Counter(answers).most_common(1)[0]
    return text if n >= threshold * len(answers) and text.strip() else None


def _sample(
    model: Decoder,
    ids: TaskIds,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    longest: int,
    sampling: Sampling,
    seed: int,
) -> list[np.ndarray]:
    """Samples (longest,) tokens after each prompt; after the first end of text, that token is repeated.

    All batches have the same shape, so that one program is compiled.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    padded = np.zeros(
        (-(-len(prompts) // ROWS) * ROWS if len(prompts) > ROWS else len(prompts), lengths.max()), np.int32
    )
    for row, prompt in zip(padded, prompts, strict=False):
        row[: len(prompt)] = prompt
    lengths = np.pad(lengths, (0, len(padded) - len(lengths)), constant_values=1)
    found: list[np.ndarray] = []
    model = unrolled(model)
    with Progress("sampling", len(prompts), unit="texts") as progress:
        for start in range(0, len(padded), ROWS):
            here = slice(start, start + ROWS)
            key = jax.random.fold_in(jax.random.key(seed), start)
            tokens_bn = generate(
                model,
                padded[here],
                lengths[here],
                n_new=longest,
                sampling=sampling,
                key=key,
                end_token=ids.end_of_text_id,
            )
            found.extend(np.asarray(tokens_bn))
            progress.advance(min(ROWS, len(prompts) - start))
    return found[: len(prompts)]


def _text(ids: TaskIds, tokens: np.ndarray) -> str | None:
    """The text of sampled tokens; None if it has no end, is empty, or contains what is not text."""
    before = _up_to_end(ids, tokens)
    if len(before) == len(tokens) or (before >= ids.answer).any():
        return None
    text = ids.decode(before).strip()
    return None if not text or "\ufffd" in text else text


def _up_to_end(ids: TaskIds, tokens: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(tokens == ids.end_of_text_id)
    return tokens[: ends[0]] if len(ends) else tokens
