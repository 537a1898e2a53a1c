"""Runs, corpora and files by what they hold."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tiny

import efftrain
from efftrain.recipe import import_script
from efftrain.train.config import Training
from efftrain.train.inputs import content, input_contents, model_digest
from efftrain.train.run.directory import load

BLOCK = """
from dataclasses import dataclass
from efftrain.models.config import Dense

@dataclass(frozen=True, kw_only=True)
class Odd(Dense):
    SCALE = 1.0
"""


@dataclass(frozen=True)
class Config:
    training: Training
    source: Path | None = None
    corpus: Path = Path("nowhere")
    out: Path = Path("out")


def test_every_number_and_every_field_of_a_model_counts(unbroken):
    model = load(unbroken[0])
    first = model_digest(model)
    assert first == model_digest(load(unbroken[0]))
    stack = model.blocks[0].mlp.up.kernel
    values = np.array(stack[...])
    assert values.size > 1000
    values.reshape(-1)[-1] = np.nextafter(values.reshape(-1)[-1], np.float32(9))
    stack[...] = jnp.asarray(values)
    assert model_digest(model) != first
    other = load(unbroken[0])
    other.config = other.config.replace(norm_eps=1e-3)
    assert model_digest(other) != first


def test_the_source_of_a_models_block_counts(unbroken, tmp_path):
    """Of a run that is loaded from its own recipe, and of the run on disk."""
    found = []
    for scale in ("1.0", "2.0"):
        run = Path(shutil.copytree(unbroken[0], tmp_path / scale / "run"))
        settings = json.loads((run / "config.json").read_text())
        settings["model"]["pattern"][0]["mlp"]["type"] = "recipe.py:Odd"
        (run / "config.json").write_text(json.dumps(settings))
        (run / "recipe.py").write_text(BLOCK.replace("1.0", scale))
        found.append((model_digest(efftrain.load(run)), content(run)))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]
    assert import_script(tmp_path / "1.0" / "run" / "recipe.py").Odd.SCALE == 1.0


def test_a_run_that_was_trained_anew_is_another_one(unbroken, crashed, tmp_path):
    same = shutil.copytree(unbroken[0], tmp_path / "elsewhere")
    assert content(same) == content(unbroken[0])
    assert content(same, step=6) == content(crashed)  # equal runs up to there
    assert content(crashed) != content(same)
    assert content(same, step=5) is None
    training = dataclasses.replace(tiny.TRAINING, steps=9, resume_from=f"{same}@6")
    found = input_contents(Config(training=training, source=same))
    assert found == {"source": content(same), "training.resume_from": content(same, step=6)}


def test_a_corpus_is_what_is_trained_on(tmp_path):
    files = {"tokens/0": "a", "tokenizer.json": "b", "text/0": "c", "removed.parquet": "d"}

    def written(**changes: str) -> str:
        found = {name: {"blake2b": value} for name, value in (files | changes).items()}
        (tmp_path / "manifest.json").write_text(json.dumps({"files": found}))
        return input_contents(Config(training=tiny.TRAINING, corpus=tmp_path))["corpus"]

    first = written()
    assert written(**{"removed.parquet": "x"}) == first
    assert len({first, written(**{"tokens/0": "x"}), written(**{"tokenizer.json": "x"})}) == 3
