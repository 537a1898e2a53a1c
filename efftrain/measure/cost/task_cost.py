"""What a question costs: bytes, FLOPs, and seconds of models side by side."""

import statistics
from collections.abc import Mapping

import numpy as np

from efftrain.data.tasks.items import TaskIds
from efftrain.data.tasks.task import Task
from efftrain.measure.cost.flops import decode_flops, prefill_flops
from efftrain.measure.cost.latency import measure_latency
from efftrain.measure.cost.parameters import count_parameters, stored_bytes
from efftrain.models.decoder import Decoder

TURNS, ROUNDS = 3, 20  # models take turns, each with so many runs


def size(model: Decoder) -> dict[str, float]:
    """``parameters`` and ``bytes``."""
    return {"parameters": count_parameters(model).total, "bytes": stored_bytes(model)}


def usual(task: Task, ids: TaskIds) -> tuple[int, int]:
    """Tokens of a test question, and of what is said behind it, at the median; a label is one."""
    read = int(np.median([len(tokens) + 2 for tokens, _ in ids.encode([e.text for e in task.test])]))
    if task.labels:
        return read, 1
    return read, int(np.median([len(tokens) + 1 for tokens, _ in ids.encode([e.answer for e in task.test])]))


def cost(task: Task, model: Decoder, ids: TaskIds) -> dict[str, float]:
    """FLOPs of a question of usual length."""
    read, said = usual(task, ids)
    flops = prefill_flops(model, read) * read + (said - 1) * decode_flops(model, read + said)
    return {"flops": flops, "tokens": read}


def side_by_side(task: Task, models: Mapping[str, tuple[Decoder, TaskIds]]) -> dict[str, float]:
    """Seconds for one question of usual length: medians of rounds that alternate between the models."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, (model, ids) in models.items():
            read, said = usual(task, ids)
            prefill, draw = measure_latency(model, batch=1, prompt_length=read, n_new=max(said - 1, 1), rounds=ROUNDS)
            times[name].append(prefill.median_s + (draw.median_s if said > 1 else 0.0))
    return {name: statistics.median(values) for name, values in times.items()}
