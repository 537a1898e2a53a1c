"""A StableHLO program and its weights: run by a process that has JAX and nothing of efftrain."""

import json
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

import efftrain
from efftrain.config import to_json
from efftrain.errors import ConfigError
from efftrain.interop.model_card import STABLEHLO
from efftrain.interop.stablehlo import DESCRIPTION, PLATFORMS, export_stablehlo, exported_forward
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths
from efftrain.models.moe.layer import MoE
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.number_formats import parse_format
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.run.model_run import write_model_run
from efftrain.train.state import split_model

pytest.importorskip("flatbuffers", reason="jax.export needs the extra interop")

SMALL = llama(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_length=24)
BLOCK = SMALL.pattern[0]
MODELS = {
    "windows, stacked": SMALL.replace(
        pattern=(replace(BLOCK, attention=replace(BLOCK.attention, window=5)),), scan=True
    ),
    "experts": SMALL.replace(pattern=(replace(BLOCK, mlp=MoE(n_experts=4, n_shared=1, d_expert=16)),)),
    "int4": SMALL.replace(
        quantization=Quantization(rules=(QuantizationRule(weights=parse_format("int4:g16")),), stored=True)
    ),
}
ALONE = """
import sys, numpy
tokens = [numpy.load(name) for name in sys.argv[1:]]
{snippet}
for name, rows in zip(sys.argv[1:], tokens):
    numpy.save(name + ".logits.npy", forward.call(weights, rows))
assert not any(name.startswith(("efftrain", "flax")) for name in sys.modules)
print(logits.shape)
"""


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SMALL.vocab_size, shape).astype(np.int32)


def logits(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, tokens))


def test_a_process_with_jax_alone_computes_the_logits_for_any_batch_and_length(tmp_path):
    _, params, rest = split_model(Decoder(SMALL, rngs=nnx.Rngs(0)))
    state = {"params": params, "model_state": rest}
    write_model_run(tmp_path / "run", state, step=7, made_from=("made.json", {}), config={"model": to_json(SMALL)})
    assert export_stablehlo(tmp_path / "run", tmp_path / "out") == ()
    tokens = {str(tmp_path / f"{number}.npy"): rows(*shape) for number, shape in enumerate([(1, 24), (3, 5)])}
    for name, array in tokens.items():
        np.save(name, array)
    # The lines of the model card themselves, from a folder where efftrain cannot be imported.
    script = ALONE.format(snippet=STABLEHLO.snippet)
    command = [sys.executable, "-c", script, *tokens]
    blocked = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path / "out", env=blocked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 3, 61)\n"
    model = efftrain.load(tmp_path / "run")
    for name, array in tokens.items():
        np.testing.assert_allclose(np.load(f"{name}.logits.npy"), logits(model, array), rtol=1e-5, atol=1e-5)
    said = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert said["platforms"] == ["cpu", "cuda", "tpu"]
    assert said["inputs"]["tokens"] == {"shape": ["batch", "length"], "dtype": "int32", "length": [1, 24]}
    assert said["outputs"]["logits"]["shape"] == ["batch", "length", 61]
    assert said["jax_version"] == jax.__version__


@pytest.mark.parametrize("name", MODELS)
def test_other_models_are_lowered_for_every_platform_and_compute_the_same(name):
    model = Decoder(MODELS[name], rngs=nnx.Rngs(1))
    program = exported_forward(MODELS[name])
    assert program.platforms == PLATFORMS
    found = program.call(flatten(nnx.state(model)), rows(2, 7))
    np.testing.assert_allclose(found, logits(model, rows(2, 7)), rtol=1e-5, atol=1e-5)


def test_a_row_that_is_too_long_is_refused():
    program, model = exported_forward(SMALL), Decoder(SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="length"):
        program.call(flatten(nnx.state(model)), rows(1, 25))


def test_depth_that_follows_from_the_length_is_refused():
    config = SMALL.replace(pattern=(replace(BLOCK, depth=MixtureOfDepths()),))
    with pytest.raises(ConfigError, match="layer 0 has depth MixtureOfDepths"):
        exported_forward(config)
