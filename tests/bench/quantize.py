"""Quantisation by the clock: training for it, decoding with it, converting to it, what is held in memory.

    python tests/bench/quantize.py                     # 8 minutes on 2 cores
    python tests/bench/quantize.py --size gpu          # on a GPU; float8 too

Training: the step of a model whose matrices are trained for 4 bits in groups of 32, over the plain step; in turn,
medians.
Decoding: one program for each storage of the same model, batch 1 and 8, in turn. Products: one (rows, d) @ (d, d)
product in several formulations, what decoding is made of. Conversion: seconds for each 100M parameters, of the blocks.
Memory: resident bytes of a process that has loaded the model and drawn a token, less those of one that has loaded
nothing; fresh processes.

Writes ``tests/bench/results/quantize.json``. The last line is JSON: ``ratio`` is the step time for quantisation over
the plain one, ``goal`` what it may be.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from clock import Stepper, in_turn, random_text
from flax import nnx

import efftrain
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.quantization.convert import Method, convert
from efftrain.measure.cost.latency import decode
from efftrain.measure.cost.memory import host_peak_bytes
from efftrain.measure.cost.parameters import stored_bytes
from efftrain.models.config import ModelConfig, llama
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import prefill
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.number_formats import AnyFormat, Float8, Integer
from efftrain.ops.quantize import quantize, quantized_product
from efftrain.recipe import restart_with_huge_pages, use_compilation_cache
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.config import Training
from efftrain.train.run.directory import Run
from efftrain.train.run.environment import environment

RESULTS = Path(__file__).parent / "results" / "quantize.json"
GOAL = 1.25
INT8, INT4 = Integer(bits=8), Integer(bits=4, group=32)
PROMPT, NEW = 32, 32

SIZES = {
    "cpu": (
        llama(vocab_size=4096, d_model=384, n_layers=6, n_heads=6, d_ff=1024, max_length=256),
        Training(steps=1000, batch_size=16, length=256),
        llama(vocab_size=4096, d_model=1024, n_layers=8, n_heads=16, d_ff=2816, max_length=256),
    ),
    "gpu": (
        llama(vocab_size=4096, d_model=1024, n_layers=12, n_heads=16, d_ff=2816, max_length=1024, dtype="bfloat16"),
        Training(steps=1000, batch_size=32, length=1024),
        llama(vocab_size=4096, d_model=4096, n_layers=16, n_heads=32, d_ff=11008, max_length=256, dtype="bfloat16"),
    ),
}
METHODS: dict[str, Method] = {"nearest": "rtn", "gptq": "gptq", "awq": "awq"}  # by their names in the results


def weights(format: AnyFormat, activations: AnyFormat | None = None) -> Quantization:
    return Quantization(rules=(QuantizationRule(weights=format, activations=activations),))


def steps(model: ModelConfig, training: Training, rounds: int, *, float8: bool) -> dict[str, float]:
    ways = {
        "plain": Quantization(),
        "int4:g32": weights(INT4),
        "int8, int8 activations": weights(INT8, INT8),
        "int4:g32, learned steps": Quantization(rules=(QuantizationRule(weights=INT4, learned_step=True),)),
    }
    if float8:
        ways["fp8, fp8 activations"] = weights(Float8(), Float8())
    return in_turn({n: Stepper(model.replace(quantization=q), training) for n, q in ways.items()}, rounds)


def decoding(model: ModelConfig, rounds: int, *, float8: bool) -> dict[str, dict[str, float]]:
    """Tokens a second of each storage, and its bytes."""
    plain = Decoder(model, rngs=nnx.Rngs(0))
    models = {"float32": plain, "bfloat16": as_bfloat16(plain)}
    for name, quantization in {
        "int8": weights(INT8),
        "int8, int8 activations": weights(INT8, INT8),
        "int4:g32": weights(INT4),
        "int8, int8 cache": replace(weights(INT8), cache=INT8),
        **({"fp8, fp8 activations": weights(Float8(), Float8())} if float8 else {}),
    }.items():
        models[name] = convert(LayerwiseModel.of(plain), quantization)[0]
    found = {name: {"bytes": stored_bytes(each)} for name, each in models.items()}
    for batch in (1, 8):
        times = in_turn({name: drawing(each, batch) for name, each in models.items()}, rounds)
        for name, seconds in times.items():
            found[name][f"tokens_per_s_b{batch}"] = batch * NEW / seconds
    return found


def as_bfloat16(model: Decoder) -> Decoder:
    """Parameters and products in bfloat16."""
    graph = nnx.split(nnx.eval_shape(lambda: Decoder(model.config.replace(dtype="bfloat16"), rngs=nnx.Rngs(0))))[0]
    return nnx.merge(graph, jax.tree.map(lambda a: a.astype("bfloat16"), nnx.state(model)))


def drawing(model: Decoder, batch: int):
    graph, state = nnx.split(model)
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 4096, (batch, PROMPT)), jnp.int32)
    logits_bv, cache = jax.jit(
        lambda state: prefill(nnx.merge(graph, state), prompts, jnp.full(batch, PROMPT), slots=PROMPT + NEW)
    )(state)
    first_b = logits_bv.argmax(-1).astype(jnp.int32)
    return lambda: jax.block_until_ready(decode(graph, state, first_b, cache, NEW))


def products(d: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of one product of 1, 8 and 128 rows, by formulation, through a stack of matrices."""
    rng, n_matrices = np.random.default_rng(0), 16
    w_ldf = jnp.asarray(rng.normal(size=(n_matrices, d, d)), jnp.float32)
    int8, int4 = quantize(w_ldf, INT8), quantize(w_ldf, INT4)

    def blocked(x_nd, q, rows: int = 64):
        """Rows of the matrix made float, a block at a time, never all of them."""

        def block(i, y_nf):
            w = jax.lax.dynamic_slice_in_dim(q.packed, i * rows, rows).astype(jnp.float32)
            return y_nf + jax.lax.dynamic_slice_in_dim(x_nd, i * rows, rows, 1) @ w

        return jax.lax.fori_loop(0, d // rows, block, jnp.zeros((len(x_nd), d))) * q.scale.astype(jnp.float32)

    def multiply_reduce(x_nd, q):
        """No product: one fused loop over the matrix as it is stored."""
        return (x_nd[:, :, None] * q.packed[None].astype(jnp.float32)).sum(1) * q.scale.astype(jnp.float32)

    ways = {
        "float32": (lambda x, w: x @ w, w_ldf),
        "bfloat16 stored": (lambda x, w: x @ w.astype(jnp.float32), w_ldf.astype("bfloat16")),
        "int8, dequantised": (lambda x, q: x @ q.dequantize(), int8),
        "int4, dequantised": (lambda x, q: x @ q.dequantize(), int4),
        "int8, blocks of rows": (blocked, int8),
        "int8, multiply and reduce": (multiply_reduce, int8),
        "int8 x int8 to int32": (lambda x, q: quantized_product(x, q, INT8), int8),
    }
    found: dict[str, dict[str, float]] = {name: {} for name in ways}
    for n in (1, 8, 128):
        x_nd = jnp.asarray(rng.normal(size=(n, d)), jnp.float32)
        compiled = {}
        for name, (product, matrices) in ways.items():
            if n > 8 and "reduce" in name:
                continue

            def through(x, matrices, product=product):
                return jax.lax.scan(lambda x, matrix: (product(x, matrix) * 1e-2, None), x, matrices)[0]

            program = jax.jit(through).lower(x_nd, matrices).compile()
            compiled[name] = lambda program=program, x=x_nd, m=matrices: jax.block_until_ready(program(x, m))
        for name, seconds in in_turn(compiled, rounds).items():
            found[name][f"us_{n}_rows"] = seconds / n_matrices * 1e6
    return found


def conversion(model: ModelConfig) -> dict[str, float]:
    """Seconds for each 100M parameters of the blocks; compiling included, which a larger model has once as well."""
    plain, found = Decoder(model, rngs=nnx.Rngs(0)), {}
    in_blocks = sum(v.size for path, v in nnx.to_flat_state(nnx.state(plain, nnx.Param)) if path[0] == "blocks")
    for name, method in METHODS.items():
        start = time.perf_counter()
        converted, _ = convert(LayerwiseModel.of(plain), weights(INT4), method=method, calibration=random_text())
        jax.block_until_ready(nnx.state(converted))
        found[name] = (time.perf_counter() - start) * 1e8 / in_blocks
    return found


def memory(model: ModelConfig) -> dict[str, dict[str, float]]:
    """Of processes that load a run of each storage, in bytes; peak and what stays."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = Decoder(model, rngs=nnx.Rngs(0))
        models = {"float32": plain}
        models |= {n: convert(LayerwiseModel.of(plain), weights(f))[0] for n, f in (("int8", INT8), ("int4:g32", INT4))}
        for name, each in models.items():
            run = Run(Path(folder) / name.replace(":", ""), Holder(each.config))
            params, rest = nnx.split(each, nnx.Param, ...)[1:]
            with Checkpoints(run.checkpoints) as checkpoints:
                checkpoints.save(1, {"params": params, "model_state": rest}, None, None)
                checkpoints.wait()
            on_disk = sum(f.stat().st_size for f in run.checkpoints.rglob("*") if f.is_file())
            found[name] = {"checkpoint_bytes": on_disk, "stored_bytes": stored_bytes(each)}
            found[name] |= in_new_process("load", run.path)
        for name in ("nearest", "gptq"):
            found[f"converting, {name}"] = in_new_process(METHODS[name], Path(folder) / "float32")
    return found


@dataclass(frozen=True)
class Holder:
    """What a run directory needs of a configuration."""

    model: ModelConfig


def in_new_process(what: str, run: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", str(run), "--do", what]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def report_memory(what: str, run: Path) -> None:
    """In a fresh process: what loading a run, or reading and converting it, adds at most and in the end."""
    jax.block_until_ready(jnp.ones(8) + 1)
    before = psutil.Process().memory_info().rss
    if what == "load":
        model = efftrain.load(run)
    else:
        text = random_text() if what != "rtn" else None
        model = convert(LayerwiseModel.read(run), weights(INT4), method=what, calibration=text)[0]
    jax.block_until_ready(nnx.state(model))
    gc.collect()
    after = psutil.Process().memory_info().rss
    figures = {"resident_bytes": after - before, "peak_resident_bytes": host_peak_bytes() - before}
    print(json.dumps(figures | {"live_array_bytes": sum(a.nbytes for a in jax.live_arrays())}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--run", type=Path, help="of a process that this script starts")
    parser.add_argument("--do", choices=("load", "rtn", "gptq"))
    options = parser.parse_args()
    if options.do:
        report_memory(options.do, options.run)
        return
    use_compilation_cache()
    restart_with_huge_pages()
    small, training, large = SIZES[options.size]
    float8 = options.size == "gpu"
    result = {"environment": environment(), "size": options.size}
    step_s = steps(small, training, options.rounds, float8=float8)
    result["step_s"], ratio = step_s, step_s["int4:g32"] / step_s["plain"]
    print(json.dumps(result["step_s"]), flush=True)
    for name, measure in {
        "products": lambda: products(large.d_model, options.rounds),
        "decoding": lambda: decoding(large, options.rounds, float8=float8),
        "conversion_s_per_100M": lambda: conversion(large),
        "memory": lambda: memory(large),
    }.items():
        result[name] = measure()
        print(name, json.dumps(result[name]), flush=True)
    result |= {"ratio": ratio, "goal": GOAL}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
