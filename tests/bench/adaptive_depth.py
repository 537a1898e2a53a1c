"""What adaptive depth saves by the clock, on trained models: self-speculation, exits by confidence, routed depth.

    python recipes/adaptive_depth.py layerskip --compare plain
    python recipes/adaptive_depth.py mixture-of-depths --compare plain
    python tests/bench/adaptive_depth.py --runs runs/adaptive-depth --seeds 0 1 2

Self-speculation, batch 1, greedy, the vocabulary head included: exit and draft length are chosen on some prompts of
the validation split (``efftrain calibrate-depth``, which is run where it has not been), and measured on others, in turn
with plain decoding; medians. Exits by confidence: curves of the calibration. Routed depth: reading and drawing, in turn
with the plain model of the same training FLOPs.

Writes ``tests/bench/results/adaptive_depth.json``. The last line is JSON: ``ratio`` is the time of plain decoding over
that of self-speculation, the median over seeds, and ``goal`` what it should reach.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import jax
import numpy as np

import efftrain
from efftrain import data
from efftrain.measure.cost.latency import measure_latency
from efftrain.measure.depth.calibrate_depth import DepthCalibration, calibrate
from efftrain.measure.depth.depth_calibration import FILE_NAME, read_calibration
from efftrain.measure.depth.speculation import measure_speculation
from efftrain.models.cache import empty_cache
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.self_speculation import extra_slots
from efftrain.recipe import restart_with_huge_pages, use_compilation_cache
from efftrain.train.run.directory import read_json
from efftrain.train.run.environment import environment

RESULTS = Path(__file__).parent / "results" / "adaptive_depth.json"
GOAL, MEMORY_GOAL = 1.3, 1.05
ROUTED = ("mixture-of-depths", "recursion")
CURVE = ("threshold", "bpb", "mean_depth", "differs")


def other_prompts(run: Path, seen: dict, n: int) -> list[np.ndarray]:
    """Of validation rows that a calibration with these options did not see."""
    settings = read_json(run / "config.json")
    loader = data.LoaderConfig(
        corpora=(data.Part(path=Path(settings["corpus"])),),
        length=settings["training"]["length"],
        batch_size=1,
        split="validation",
        repeat=False,
    )
    rows = itertools.islice(data.batches(loader, verify=False), seen["rows"], seen["rows"] + n)
    return [row["tokens"][:, : seen["prompt_length"]].astype(np.int32) for row in rows]


def cache_bytes(model: Decoder, slots: int) -> int:
    cache = jax.eval_shape(lambda: empty_cache(model.config, 1, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def speculation(run: Path, n_prompts: int) -> dict:
    if not (run / FILE_NAME).exists():
        calibrate(run, DepthCalibration())
    model, values = efftrain.load(run), read_json(run / FILE_NAME)
    chosen = read_calibration(run, model).speculation()
    seen = values["options"]
    found = measure_speculation(model, other_prompts(run, seen, n_prompts), chosen, seen["n_new"])
    slots = seen["prompt_length"] + seen["n_new"]
    exits = {
        rule: {
            "curve": [{name: point[name] for name in CURVE} for point in of_rule["curve"]],
            "within_1_percent": {name: of_rule["within_quality_loss"][name] for name in CURVE},
            "within_risk": of_rule["threshold"],
        }
        for rule, of_rule in values["confidence_exit"].items()
    }
    return found | {
        "cache_ratio": cache_bytes(model, slots + extra_slots(chosen)) / cache_bytes(model, slots),
        "grid": values["self_speculation"]["grid"],
        "exits": exits,
        "exit_seconds": values["seconds"],
    }


def latencies(models: dict[str, Decoder], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of reading 128 tokens and of drawing one, one row and eight; the models take turns."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            for batch in (1, 8):
                prefill, decode = measure_latency(model, batch=batch, prompt_length=128, n_new=64, rounds=3)
                seconds[name].setdefault(f"prefill_s_b{batch}", []).append(prefill.median_s)
                seconds[name].setdefault(f"decode_s_per_token_b{batch}", []).append(decode.s_per_token)
    return {
        name: {figure: statistics.median(values) for figure, values in of_model.items()}
        for name, of_model in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/adaptive-depth"), help="the recipe's output folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    use_compilation_cache()
    restart_with_huge_pages()

    runs = {}
    for seed in given.seeds:
        runs[seed] = speculation(given.runs / f"layerskip-seed{seed}", given.prompts)
        row = runs[seed]
        print(
            f"seed {seed}: {row['n_draft']} drafts with {row['exit_layer']} layers, {row['acceptance']:.0%} accepted, "
            f"{row['tokens_per_s']:,.0f} against {row['plain_tokens_per_s']:,.0f} tokens/s, {row['speedup']:.2f}x, "
            f"{'the same tokens' if row['identical'] else 'OTHER TOKENS'}",
            flush=True,
        )
    first = given.seeds[0]
    names = ("plain", *(name for name in ROUTED if (given.runs / f"{name}-seed{first}").exists()))
    routed = latencies({name: efftrain.load(given.runs / f"{name}-seed{first}") for name in names}, given.rounds)
    for name, figures in routed.items():
        print(f"{name:>20}", *(f"{figure} {1e3 * value:.2f} ms" for figure, value in figures.items()), flush=True)
    ratio = statistics.median(row["speedup"] for row in runs.values())
    result = {
        "bench": "adaptive_depth",
        "speedups": [row["speedup"] for row in runs.values()],
        "acceptance": [row["acceptance"] for row in runs.values()],
        "identical": all(row["identical"] for row in runs.values()),
        "cache_ratio": max(row["cache_ratio"] for row in runs.values()),
        "cache_goal": MEMORY_GOAL,
        "routed_seconds": routed,
        "ratio": round(ratio, 4),
        "goal": GOAL,
    }
    RESULTS.write_text(json.dumps(result | {"runs": runs, "environment": environment()}, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
