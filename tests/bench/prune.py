"""Pruning by the clock: a sparse training step, pruning at once, and the time before and after a structured cut.

    python tests/bench/prune.py --rounds 3          # 5 minutes on 2 cores; more rounds are steadier
    python tests/bench/prune.py --size gpu          # on a GPU

Training: a step between two updates of the masks, and one that updates them, over the dense step; in turn, medians.
Memory: bytes of masks and of the optimizer's state, counted. At once: seconds for each 100M parameters of blocks, on 32
rows of 256 tokens. Latency: a model and what is left of it when a third of its parameters is cut off, by width and by
depth: a prompt, and a token after it, one row and eight; in turn, medians. The parameters are random.

Writes ``tests/bench/results/prune.json``. The last line is JSON: ``ratio`` is the sparse step between updates over the
dense step, ``goal`` what it may be.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import jax
from clock import Stepper, in_turn, random_text
from flax import nnx

from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.pruning.one_shot import prune
from efftrain.compress.pruning.scores import Magnitude
from efftrain.compress.pruning.sparsify import Sparsity, sparsify
from efftrain.compress.pruning.sparsity_schedules import Gradual, OneShot
from efftrain.compress.structured.shape import shaped
from efftrain.compress.structured.shapes import candidates
from efftrain.measure.cost.latency import side_by_side
from efftrain.measure.cost.parameters import count_parameters
from efftrain.models.config import ModelConfig, llama
from efftrain.models.decoder import Decoder
from efftrain.ops.masks import SemiStructured, Unstructured
from efftrain.recipe import restart_with_huge_pages, use_compilation_cache
from efftrain.train.config import Training
from efftrain.train.optimizers import AdamW
from efftrain.train.run.environment import environment

RESULTS = Path(__file__).parent / "results" / "prune.json"
GOAL = 1.1
STEPS = 1000
SIZES = {
    "cpu": (
        llama(vocab_size=4096, d_model=384, n_layers=6, n_heads=6, d_ff=1024, max_length=256),
        Training(steps=STEPS, batch_size=16, length=256),
        llama(vocab_size=4096, d_model=768, n_layers=12, n_heads=12, d_ff=2304, max_length=256, tied_embedding=True),
    ),
    "gpu": (
        llama(vocab_size=4096, d_model=1024, n_layers=12, n_heads=16, d_ff=2816, max_length=1024, dtype="bfloat16"),
        Training(steps=STEPS, batch_size=32, length=1024),
        llama(vocab_size=4096, d_model=2048, n_layers=24, n_heads=16, d_ff=5632, max_length=256, dtype="bfloat16"),
    ),
}
PRUNED = llama(vocab_size=4096, d_model=512, n_layers=3, n_heads=8, d_ff=1536, max_length=256, tied_embedding=True)

# One update at the last step but one is not met here; and one at every step.
BETWEEN, ALWAYS = OneShot(at=0.8), Gradual(start=0.0, end=0.8, updates=round(0.8 * STEPS))


def training(model: ModelConfig, config: Training, rounds: int) -> dict[str, float]:
    ways: dict[str, Sparsity | None] = {"dense": None}
    for name, score in (("magnitude", Magnitude()), ("straight through", Magnitude(straight_through=True))):
        ways[name] = Sparsity(schedule=BETWEEN, score=score)
        ways[f"{name}, with an update"] = Sparsity(schedule=ALWAYS, score=score)
    return in_turn({n: Stepper(model, config, s and s.around(config)) for n, s in ways.items()}, rounds)


def memory(model: ModelConfig) -> dict[str, float]:
    """Bytes for each weight that may be pruned, and of the whole state of AdamW beside it."""
    params = nnx.state(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))), nnx.Param)
    inner = AdamW().build(lambda step: 1.0)
    found = {}
    for name, score in (("magnitude", Magnitude()), ("straight through", Magnitude(straight_through=True))):
        state = jax.eval_shape(sparsify(inner, Sparsity(score=score), STEPS).init, params)
        weights = sum(m.size for m in jax.tree.leaves(state.masks)) * 8
        found[f"{name}, mask bits a weight"] = 8 * _bytes(state.masks) / weights
        found[f"{name}, bytes a weight"] = (_bytes(state.masks) + _bytes(state.kept)) / weights
    return found


def _bytes(tree) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def at_once(model: ModelConfig) -> dict[str, float]:
    """Seconds for each 100M parameters of blocks, compiling included as a user has it."""
    decoder, found = Decoder(model, rngs=nnx.Rngs(0)), {}
    text = random_text(32)
    for name, structure in {"half": Unstructured(sparsity=0.5), "2of4": SemiStructured(n=2, m=4)}.items():
        for method in ("magnitude", "wanda", "sparsegpt"):
            start = time.perf_counter()
            pruned, _ = prune(LayerwiseModel.of(decoder), structure, method=method, calibration=text)
            jax.block_until_ready(nnx.state(pruned))
            n = count_parameters(decoder).non_embedding
            found[f"{name}, {method}"] = (time.perf_counter() - start) * 1e8 / n
    return found


def latency(model: ModelConfig, rounds: int) -> dict[str, dict[str, float]]:
    shapes = {
        axis: candidates(model, 0.67, axis=axis, metric="parameters", length=256)[0] for axis in ("width", "depth")
    }
    configs = {"whole": model}
    for axis, shape in shapes.items():
        configs[axis] = shaped(model, shape, tuple(range(shape.n_layers)))
    decoders = {name: Decoder(config, rngs=nnx.Rngs(0)) for name, config in configs.items()}
    found = side_by_side(decoders, n_new=32, turns=rounds, rounds=2)
    ratios = {f"speedup, {axis}": {f: found["whole"][f] / value for f, value in found[axis].items()} for axis in shapes}
    for name, decoder in decoders.items():
        found[name]["parameters"] = count_parameters(decoder).total
    return found | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    use_compilation_cache()
    restart_with_huge_pages()
    small, config, large = SIZES[options.size]
    result = {"environment": environment(), "size": options.size}
    for name, measure in {
        "step_s": lambda: training(small, replace(config, steps=STEPS), options.rounds),
        "memory": lambda: memory(small),
        "at_once_s_per_100M": lambda: at_once(PRUNED),
        "latency": lambda: latency(large, max(options.rounds // 2, 1)),
    }.items():
        result[name] = measure()
        print(name, json.dumps(result[name]), flush=True)
    step_s = result["step_s"]
    result |= {"ratio": step_s["straight through"] / step_s["dense"], "goal": GOAL}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
