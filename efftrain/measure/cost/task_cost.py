"""Cost of answering a question of a task: bytes and FLOPs, and seconds of several models side by side."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from efftrain.data.tasks.items import TaskIds
from efftrain.data.tasks.task import Task, answers
from efftrain.measure.cost.flops import decode_flops, prefill_flops
from efftrain.measure.cost.latency import in_turns, measure_latency
from efftrain.measure.cost.parameters import count_parameters, stored_bytes
from efftrain.models.decoder import Decoder

TURNS, ROUNDS = 3, 20  # number of turns of each model, and of runs in a turn


def size(model: Decoder) -> dict[str, float]:
    """Number of ``parameters`` of a model, and its ``bytes``."""
    return {"parameters": count_parameters(model).total, "bytes": stored_bytes(model)}


def usual(task: Task, ids: TaskIds) -> tuple[int, int]:
    """Median number of tokens of a test question, and of its answer; a label is one token."""
    read = int(np.median([len(tokens) + 2 for tokens, _ in ids.encode([e.text for e in task.test])]))
    if task.labels:
        return read, 1
    return read, int(np.median([len(tokens) + 1 for tokens, _ in ids.encode(answers(task.test))]))


def cost(task: Task, model: Decoder, ids: TaskIds) -> dict[str, float]:
    """``flops`` of answering a question of median length, and its ``tokens``."""
    read, said = usual(task, ids)
    flops = prefill_flops(model, read) * read + (said - 1) * decode_flops(model, read + said)
    return {"flops": flops, "tokens": read}


def seconds_to_answer(task: Task, models: Mapping[str, tuple[Decoder, TaskIds]]) -> dict[str, float]:
    """Seconds to answer one question of median length, for each model; the models take turns, see ``in_turns``."""

    def answer(model: Decoder, ids: TaskIds) -> dict[str, float]:
        read, said = usual(task, ids)
        prefill, decode = measure_latency(model, batch=1, prompt_length=read, n_new=max(said - 1, 1), rounds=ROUNDS)
        return {"seconds": prefill.median_s + (decode.median_s if said > 1 else 0.0)}

    found = in_turns({name: partial(answer, *pair) for name, pair in models.items()}, TURNS)
    return {name: figures["seconds"] for name, figures in found.items()}
