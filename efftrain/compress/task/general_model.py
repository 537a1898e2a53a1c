"""A general model on a task without tuning, as a baseline: a linear probe, and examples in its prompt."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import efftrain
from efftrain.compress.task.task_run import general_ids
from efftrain.data.tasks.task import Example, Task
from efftrain.measure.cost.task_cost import cost, seconds_to_answer, size
from efftrain.measure.quality.few_shot import few_shot
from efftrain.measure.quality.probe import fit_probe, frozen_features
from efftrain.measure.quality.task_scores import classification

SHOTS, FEW_SHOT_TEXTS = 16, 300  # largest number of examples in a prompt; number of random test texts that are scored


def probe_on_task(general: Path, task: Task, tokenizer: Path | None = None) -> dict[str, float]:
    """Scores and cost of a logistic regression on a general model's features; nothing in it is random.

    Args:
      general: run directory of the general model.
      task: a task with labels.
      tokenizer: see ``general_ids``.
    """
    model, ids = efftrain.load(general), general_ids(general, task, tokenizer)

    def features(examples: Sequence[Example]) -> np.ndarray:
        encoded = ids.encode([e.text for e in examples])
        return frozen_features(model, [np.append(ids.end_of_text_id, tokens) for tokens, _ in encoded])

    held_out = task.numbers(task.validation)
    probe = fit_probe(
        features(task.train), task.numbers(task.train), features(task.validation), held_out, n_labels=len(task.labels)
    )
    found = classification(probe(features(task.test)), task.numbers(task.test))
    extra = probe.weights_fl.size + probe.bias_l.size
    sizes = {"parameters": size(model)["parameters"] + extra, "bytes": size(model)["bytes"] + 4 * extra}
    times = seconds_to_answer(task, {"model": (model, ids)})  # the probe itself is one small product
    return found | sizes | {"l2": probe.l2, "latency_s": times["model"]} | cost(task, model, ids)


def few_shot_on_task(general: Path, task: Task, tokenizer: Path | None = None, *, seed: int) -> dict[str, float]:
    """Scores and cost of a general model with examples in its prompt, on random texts of the test.

    Args:
      general: run directory of the general model.
      task: a task with labels.
      tokenizer: see ``general_ids``.
      seed: seed of the choice of examples and texts.
    """
    model, ids = efftrain.load(general), general_ids(general, task, tokenizer)
    random = np.random.default_rng(seed)
    tested = [task.test[i] for i in random.permutation(len(task.test))[:FEW_SHOT_TEXTS]]
    shown = [(task.train[i].text, task.train[i].answer) for i in random.permutation(len(task.train))[: 4 * SHOTS]]
    shown = sorted(shown[: 2 * SHOTS], key=lambda pair: len(pair[0]))[:SHOTS]  # the short ones of twice as many
    found = few_shot(
        model, ids.tokenizer, shown, task.labels, [e.text for e in tested], shots=SHOTS, end_of_text=ids.end_of_text
    )
    figures = classification(found.logits_nl, task.numbers(tested))
    return figures | size(model) | {"shots": found.shots, "texts": len(tested), "latency_s": found.latency_s}
