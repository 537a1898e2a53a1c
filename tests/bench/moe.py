"""A mixture of experts against a dense model of equal active FLOPs: step time of each dispatch, memory, balance.

    python tests/bench/moe.py                                   # 4 minutes on 2 cores
    python tests/bench/moe.py --corpus corpora/python           # and the balance after 500 steps: 5 minutes more
    python tests/bench/moe.py --size gpu                        # on a GPU

Time: alternating rounds, medians. The model is that of ``train_step.py``; each of 8 experts has half the width of the
dense feed-forward part, and a token uses 2. Memory: temporaries of the compiled step. Balance: MaxVio (fullest expert
over the mean load, - 1) on 50 batches, each alone and all together, mean over layers, with and without the bias: of
the training split, not seen yet, and of other packages, the validation split.

Writes ``tests/bench/results/moe.json``. The last line is JSON: ``ratio`` is the step time of the platform's own
dispatch over the dense model's, ``goal`` what it may be.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from efftrain import data
from efftrain.models.config import ModelConfig, llama
from efftrain.models.decoder import Decoder
from efftrain.models.moe import DISPATCH, MoE
from efftrain.ops.platform import platform
from efftrain.recipe import import_script, restart_with_huge_pages, use_compilation_cache
from efftrain.train.config import Training
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.program import make_program
from efftrain.train.run.environment import environment
from efftrain.train.state import merge_model

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "moe.json"
GOALS = {"cpu": 1.3, "gpu": 1.5}
MEMORY_GOAL, BALANCE_GOAL = 1.3, 0.1
BALANCE_STEPS, HELD_OUT_BATCHES = 500, 50
WARM_UP = 5

SIZES = {
    "cpu": (
        llama(vocab_size=4096, d_model=384, n_layers=6, n_heads=6, d_ff=1024, max_length=256),
        Training(steps=1000, batch_size=16, length=256),
    ),
    "gpu": (
        llama(
            vocab_size=4096, d_model=1024, n_layers=12, n_heads=16, d_ff=2816, max_length=1024, dtype="bfloat16"
        ),
        Training(steps=1000, batch_size=32, length=1024),
    ),
}  # fmt: skip


def with_experts(dense: ModelConfig, **changes) -> ModelConfig:
    """The same active parameters in two of eight experts."""
    block = dense.pattern[0]
    mlp = MoE(n_experts=8, top_k=2, d_expert=block.mlp.d_ff // 2, **changes)
    return dense.replace(pattern=(replace(block, mlp=mlp),))


class Stepper:
    """The compiled step of a model, and its state."""

    def __init__(self, model: ModelConfig, training: Training):
        program = make_program(lambda rngs: Decoder(model, rngs=rngs), next_token_loss, training)
        self.graph = program.graph
        self.state = jax.jit(program.init)()
        batch = as_batch(np.zeros((training.batch_size, training.length + 1), np.int32))
        compiled = jax.jit(program.step, donate_argnums=0).lower(self.state, batch).compile()
        self._run, self.temporaries = compiled, compiled.memory_analysis().temp_size_in_bytes

    def __call__(self, batch) -> dict:
        self.state, metrics = self._run(self.state, batch)
        return metrics


def as_batch(tokens: np.ndarray) -> dict:
    ones = np.ones_like(tokens[:, 1:])
    positions = np.tile(np.arange(ones.shape[1], dtype=np.int32), (len(tokens), 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": ones,
        "positions": positions,
        "mask": ones.astype(bool),
    }


def batch_of(number: int, training: Training) -> dict:
    """Of words as frequent as those of a language."""
    draw = np.random.default_rng(number).zipf(1.3, (training.batch_size, training.length + 1))
    return as_batch((draw % 4096).astype(np.int32))


def time_steps(steppers: dict[str, Stepper], training: Training, rounds: int) -> dict[str, float]:
    """Median seconds of a step; the models take turns. The first steps balance the experts, and are not counted.

    What takes over 30 times as long as another is timed once.
    """
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for number in range(rounds + WARM_UP):
        batch = batch_of(number, training)
        for name, step in steppers.items():
            if times[name] and times[name][0] > 30 * min(t[0] for t in times.values()):
                continue
            start = time.perf_counter()
            jax.block_until_ready(step(batch))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[WARM_UP:] or values) for name, values in times.items()}


def balance(corpus: Path, *, bias_rate: float) -> dict[str, float]:
    """MaxVio after a whole run of so many steps with the recipe's cpu model."""
    config = import_script(ROOT / "recipes" / "moe.py").configs["cpu"]
    mlp = replace(config.model.pattern[0].mlp, bias_rate=bias_rate)
    model = config.model.replace(pattern=(replace(config.model.pattern[0], mlp=mlp),))
    training = replace(config.training, steps=BALANCE_STEPS)
    loader = data.LoaderConfig(
        corpora=(data.Part(path=corpus),), length=training.length, batch_size=training.batch_size
    )
    step, batches = Stepper(model, training), data.batches(loader)
    for _ in range(BALANCE_STEPS):
        step(next(batches))
    trained = merge_model(step.graph, step.state)
    graph, state = nnx.split(trained)

    @jax.jit
    def loads(state, batch):
        hidden = nnx.merge(graph, state).hidden
        rows = batch["tokens"], batch["segments"], batch["positions"]
        return hidden(rows[0], segments_bt=rows[1], positions_bt=rows[2])[1]["statistics"][0]["loads"]

    def violation(loads: np.ndarray) -> float:
        return float((loads.max(-1) / loads.mean(-1) - 1).mean())

    figures = {}
    for name, rows in {"unseen": batches, "other packages": data.batches(replace(loader, split="validation"))}.items():
        found_ble = np.stack([loads(state, next(rows)) for _ in range(HELD_OUT_BATCHES)])
        figures |= {f"{name}, all": violation(found_ble.sum(0)), f"{name}, a batch": violation(found_ble)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--corpus", type=Path, help="measure the balance too, on this corpus")
    given = parser.parse_args()
    use_compilation_cache()
    restart_with_huge_pages()
    dense, training = SIZES[given.size]
    here = platform()
    models = {"dense": dense} | {name: with_experts(dense, dispatch=name) for name in ("blocks", "capacity", "ragged")}
    steppers = {name: Stepper(model, training) for name, model in models.items()}
    seconds = time_steps(steppers, training, given.rounds)
    tokens = training.batch_size * training.length
    print(f"{'':>10}{'s a step':>10}{'/ dense':>9}{'tokens/s':>10}{'MB temporary':>14}")
    for name, step in steppers.items():
        print(
            f"{name:>10}{seconds[name]:>10.3f}{seconds[name] / seconds['dense']:>9.2f}{tokens / seconds[name]:>10,.0f}"
            f"{step.temporaries / 1e6:>14.0f}",
            flush=True,
        )
    result = {
        "bench": "moe",
        "size": given.size,
        "platform": here,
        "step_s": seconds,
        "ratios": {name: seconds[name] / seconds["dense"] for name in steppers if name != "dense"},
        "temporary_bytes": {name: step.temporaries for name, step in steppers.items()},
        "memory_ratio": steppers[DISPATCH[here]].temporaries / steppers["capacity"].temporaries,
        "memory_goal": MEMORY_GOAL,
        "max_violation": None,
        "max_violation_goal": BALANCE_GOAL,
    }
    if given.corpus is not None:
        rate = import_script(ROOT / "recipes" / "moe.py").configs["cpu"].model.pattern[0].mlp.bias_rate
        result["max_violation"] = {
            "with_bias": balance(given.corpus, bias_rate=rate),
            "without": balance(given.corpus, bias_rate=0.0),
        }
    result |= {"ratio": round(result["ratios"][DISPATCH[here]], 4), "goal": GOALS.get(here)}
    RESULTS.write_text(json.dumps(result | {"environment": environment()}, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
