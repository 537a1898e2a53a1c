"""Scaled rotary positions before and after the original context, where transformers chooses by the length of a text."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="needs the extra interop-test")
pytest.importorskip("transformers", reason="needs the extra interop-test")

import random_models  # noqa: E402 - needs torch
from random_models import LONG_ROPE, VOCABULARY, YARN  # noqa: E402

import efftrain  # noqa: E402
from efftrain.cli.import_model import import_model as import_command  # noqa: E402
from efftrain.errors import ConfigError  # noqa: E402
from efftrain.interop.export_model import export_model  # noqa: E402
from efftrain.interop.import_model import import_model  # noqa: E402
from efftrain.models.decoding.generate import generate  # noqa: E402

ORIGINAL, N_NEW = 96, 24
IDS = np.random.default_rng(2).integers(0, VOCABULARY, (1, 200)).astype(np.int32)
LONG = LONG_ROPE | {"original_max_position_embeddings": ORIGINAL}


def long_rope(folder: Path, **scaling: Any) -> Any:
    return random_models.make(
        "phi3, longrope", folder, rope_parameters=LONG | scaling, original_max_position_embeddings=ORIGINAL
    )


def difference(ours: nnx.Module, theirs: Any, length: int) -> float:
    """The largest difference of logits, in standard deviations, and whether greedy tokens are equal."""
    graph, state = nnx.split(ours)
    found = np.asarray(jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, jnp.asarray(IDS[:, :length])))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(IDS[:, :length]).long()).logits.numpy()
    return float(np.abs(found - wanted).max() / wanted.std())


def greedy_tokens_are_equal(ours: nnx.Module, theirs: Any, length: int) -> bool:
    prompt = torch.from_numpy(IDS[:, :length]).long()
    with torch.no_grad():
        wanted = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=N_NEW,
            min_new_tokens=N_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return np.asarray(generate(ours, IDS[:, :length], n_new=N_NEW)).tolist() == wanted[:, length:].tolist()


@pytest.mark.parametrize("scaling", [{}, {"factor": 3.0}, {"attention_factor": 1.4}], ids=str)
def test_an_import_for_the_original_context_has_the_short_factors(tmp_path, scaling):
    theirs = long_rope(tmp_path / "theirs", **scaling)
    import_model(tmp_path / "theirs", tmp_path / "run", max_length=ORIGINAL)
    ours = efftrain.load(tmp_path / "run")
    assert difference(ours, theirs, ORIGINAL) < 1e-4
    if scaling:
        return
    assert greedy_tokens_are_equal(ours, theirs, ORIGINAL - N_NEW)
    export_model(tmp_path / "run", tmp_path / "export")
    exported = random_models.transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", attn_implementation="eager"
    )
    assert difference(ours, exported.eval(), ORIGINAL) < 1e-4


@pytest.mark.parametrize("scaling", [{}, {"factor": 3.0}, {"attention_factor": 1.4}], ids=str)
def test_an_import_for_longer_texts_has_the_long_factors_and_says_so(tmp_path, capsys, scaling):
    theirs = long_rope(tmp_path / "theirs", **scaling)
    import_command(tmp_path / "theirs", out=tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert "transformers its short ones for texts of up to 96 tokens, as does an import with --max-length 96" in said
    ours = efftrain.load(tmp_path / "run")
    assert difference(ours, theirs, IDS.shape[1]) < 1e-4
    assert difference(ours, theirs, ORIGINAL) > 1e-2  # what the sentence says
    assert scaling or greedy_tokens_are_equal(ours, theirs, IDS.shape[1])


YARNS = {
    "not rounded": {"truncate": False},
    "a factor of attention": {"attention_factor": 1.3},
    "of DeepSeek": {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0},
}


@pytest.mark.parametrize("fields", list(YARNS.values()), ids=list(YARNS))
def test_every_field_of_yarn_counts(tmp_path, fields):
    scaling = YARN | {"original_max_position_embeddings": ORIGINAL} | fields
    theirs = random_models.make("llama, yarn", tmp_path / "theirs", rope_parameters=scaling)
    import_model(tmp_path / "theirs", tmp_path / "run")
    assert difference(efftrain.load(tmp_path / "run"), theirs, IDS.shape[1]) < 1e-4


def test_dynamic_scaling_is_refused_where_it_would_have_an_effect(tmp_path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    random_models.make("llama, dynamic", tmp_path / "theirs", rope_parameters=dynamic)
    with pytest.raises(ConfigError, match=r"model.max_length is 1024, and beyond 96 tokens .* DynamicScaling depend"):
        import_model(tmp_path / "theirs", tmp_path / "run")
    assert import_model(tmp_path / "theirs", tmp_path / "run", max_length=ORIGINAL).max_length == ORIGINAL


@pytest.mark.parametrize(
    ("name", "max_length", "message"),
    [
        ("gpt2", 96, "--max-length is 96, and this model has a learned vector for each of its 1024 positions"),
        ("llama", 1025, "--max-length is 1025; use 2 to 1024"),
        ("llama", 1, "--max-length is 1; use 2 to 1024"),
    ],
)
def test_a_length_that_does_not_fit_is_refused(tmp_path, name, max_length, message):
    random_models.make(name, tmp_path / "theirs")
    with pytest.raises(ConfigError, match=message):
        import_model(tmp_path / "theirs", tmp_path / "run", max_length=max_length)
