"""Quantisation as a user has it: the recipe, then ``efftrain compress``, killed, repeated, given bad input."""

import json
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from running import compress, logits, run, run_alone, start

import efftrain
from efftrain.measure.quality.held_out import reporting
from efftrain.models.quantization import Packed, Quantization
from efftrain.recipe import import_script
from efftrain.train.metrics.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 20
SMALL = f"""
    --model.vocab-size 300 --model.d-model 16 --model.n-repeats 2 --model.max-length 32
    --model.pattern.0.attention.n-heads 2 --model.pattern.0.attention.n-kv-heads 2
    --model.pattern.0.attention.d-head 8 --model.pattern.0.mlp.d-ff 32
    --model.quantization.rules.0.weights.group 8
    --training.steps {STEPS} --training.batch-size 4 --training.length 16
    --training.checkpoint-every 4 --training.keep-every 4 --share 0.2
""".split()


@pytest.fixture(scope="module")
def command(corpus):
    def make(out: Path, *changes: str) -> list[str]:
        script = str(ROOT / "recipes" / "qat.py")
        return [sys.executable, script, "cpu", "--corpus", str(corpus), "--out", str(out), *SMALL, *changes]

    return make


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "int4"
    code, output = run_alone(command(out))
    assert code == 0, output
    return out


def test_the_float_run_stands_beside_and_both_share_their_beginning(trained):
    plain = trained.with_name("float-seed0")
    assert [row["step"] for row in read_metrics(plain)] == list(range(1, STEPS + 1))
    assert [row["step"] for row in read_metrics(trained)] == list(range(17, STEPS + 1))  # the last fifth
    assert json.loads((trained / "config.json").read_text())["training"]["resume_from"] == f"{plain}@16"
    assert efftrain.load(plain).config.quantization == Quantization()
    assert np.abs(logits(efftrain.load(plain)) - logits(efftrain.load(trained))).max() > 1e-3


def test_what_was_trained_is_what_is_stored(trained, corpus):
    """In a directory of its own, by the name of the options, to the bit; the second time nothing is done."""
    code, output = compress("quantize", trained)
    assert code == 0, output
    out = trained.with_name("int4-stored")
    model = efftrain.load(out)
    np.testing.assert_array_equal(logits(model), logits(efftrain.load(trained)))
    assert sum(isinstance(v, Packed) for _, v in nnx.to_flat_state(nnx.state(model))) == 7
    figures = json.loads((out / "scorecard.json").read_text())["figures"]
    assert figures["quantized_bytes_share"]["value"] == (0.5 + 2 / 8) / 4
    before = json.loads((trained / "scorecard.json").read_text())["figures"]
    same_rows = reporting(corpus, 16).evaluator()(efftrain.load(trained))
    assert figures["bpb"]["value"] == pytest.approx(same_rows["bpb"], rel=1e-6)
    assert (before["bpb"]["split"], figures["bpb"]["split"]) == ("validation", "test")
    assert figures["checkpoint_bytes"]["value"] < before["checkpoint_bytes"]["value"] / 4
    report = json.loads((out / "compression.json").read_text())
    assert {m["name"] for m in report["matrices"] if m["method"] == "none"} == {"embedding"}
    stamp = (out / "scorecard.json").stat().st_mtime_ns
    code, output = compress("quantize", trained)
    assert code == 0
    assert "is converted already" in output
    assert (out / "scorecard.json").stat().st_mtime_ns == stamp
    code, output = compress("quantize", out)
    assert code == 2
    assert f"error: the model of {out} is converted already; convert the one it was made from" in output


def test_a_budget_gives_layers_formats_of_their_own(trained):
    plain = trained.with_name("float-seed0")
    out = trained.with_name("mixed")
    arguments = ("--weights", "int8,int4:g8", "--budget", "0.23", "--rows", "8", "--out", out)
    code, output = compress("quantize", plain, *arguments)
    assert code == 0, output
    report = json.loads((out / "compression.json").read_text())
    formats = {m["format"] for m in report["matrices"] if m["method"] != "none"}
    assert formats == {"int8", "int4:g8"}
    assert report["bytes_share"] == pytest.approx(report["choice"]["share"])
    assert report["bytes_share"] <= 0.23
    assert len(report["choice"]["costs"]) == 4  # attention and mlp of two layers
    model = efftrain.load(out)
    assert len(model.config.pattern) == 2
    assert np.isfinite(logits(model)).all()
    assert not list(out.parent.glob("*.incomplete*"))
    assert not list(out.parent.glob(".*incomplete*"))


def test_a_conversion_that_was_killed_is_not_one(trained, tmp_path):
    """Killed at different times: the new directory is there whole, or not at all, and the command can be repeated."""
    plain, out = trained.with_name("float-seed0"), tmp_path / "killed"
    arguments = ("--weights", "int4:g8", "--method", "gptq", "--rows", "8", "--out", out, "--cache", "int8")
    command = [sys.executable, "-m", "efftrain.cli", "compress", "quantize", str(plain), *map(str, arguments)]
    seen = set()
    for _ in range(3):
        process = start(command)
        while process.poll() is None and not (tmp_path / "killed.incomplete").exists() and not out.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen.add(out.exists())
        if out.exists():
            efftrain.load(out)
    code, output = run(command)
    assert code == 0, output
    assert (out / "scorecard.json").exists()
    assert efftrain.load(out).config.quantization.cache is not None
    assert not (tmp_path / "killed.incomplete").exists()


def test_a_folder_of_the_users_is_not_taken_for_a_half_written_one(trained, tmp_path):
    """Beside ``out``, under the name of an unfinished conversion: refused and kept; an empty one is taken."""
    plain = trained.with_name("float-seed0")
    theirs, empty = tmp_path / "a.incomplete", tmp_path / "b.incomplete"
    theirs.mkdir()
    empty.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    code, output = compress("quantize", plain, "--weights", "int8", "--out", tmp_path / "a")
    assert (code, "Traceback" in output) == (2, False), output
    assert "a.incomplete" in output
    assert (theirs / "thesis.txt").read_text() == "years of work"
    code, output = compress("quantize", plain, "--weights", "int8", "--out", tmp_path / "b")
    assert code == 0, output
    assert not empty.exists()


def test_bad_input_is_one_sentence(trained, tmp_path):
    plain = trained.with_name("float-seed0")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    cases = {
        (plain,): "was not trained for quantisation and has no zeros; give a number format, such as --weights int8",
        (plain, "--weights", "int3"): "'int3' is not a number format; use one of int8, int4, ternary, fp8",
        (plain, "--weights", "int8", "--layers", "nothing"): "matches no matrix; they are blocks/0/attention/key",
        (plain, "--weights", "int4:g32"): "the group of 32 does not divide 16 inputs; use a group of 16",
        (plain, "--cache", "int8:g4"): "the cache has one scale for each token and head",
        (plain, "--weights", "int8", "--out", tmp_path / "mine"): "exists and is not a converted model",
        (tmp_path / "nowhere", "--weights", "int8"): "so it is not a run; give the --out of a training run",
    }
    for arguments, message in cases.items():
        code, output = compress("quantize", *arguments)
        assert (code, "Traceback" in output) == (2, False), output
        assert message in " ".join(output.split()), output
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in plain.parent.iterdir() if p.name.startswith("float-seed0-")) == []


def test_trained_rules_are_kept_where_options_leave_them_open(trained, tmp_path):
    from efftrain.compress.commands.formats import ALL_BLOCKS, rules_of

    config = efftrain.load(trained).config
    assert config.quantization.rules[0].learned_step
    (rule,) = rules_of(config, weights=None, activations="int8", layers=ALL_BLOCKS)
    assert rule.weights == config.quantization.rules[0].weights
    assert rule.activations.bits == 8
    learned = replace(config.quantization.rules[0], learned_step=True)
    config = config.replace(quantization=Quantization(rules=(learned,)))
    assert rules_of(config, weights="int4:g8", activations=None, layers=ALL_BLOCKS) == (learned,)
    assert not rules_of(config, weights="int8", activations=None, layers=ALL_BLOCKS)[0].learned_step


def test_a_run_from_the_beginning_and_one_behind_the_end(trained, command, tmp_path):
    """``--start beginning`` needs no float run; ``finish`` starts from the float model, with its own short schedule."""
    code, output = run(command(tmp_path / "own", "--start", "beginning"))
    assert code == 0, output
    assert len(read_metrics(tmp_path / "own")) == STEPS
    assert not (tmp_path / "float-seed0").exists()
    shutil.copytree(trained.with_name("float-seed0"), tmp_path / "again" / "float-seed0")
    settings = json.loads((tmp_path / "again" / "float-seed0" / "config.json").read_text())
    code, output = run(command(tmp_path / "again" / "short", "--start", "finish"))
    assert code == 0, output
    assert settings["training"]["steps"] == STEPS
    rows = read_metrics(tmp_path / "again" / "short")
    assert len(rows) == 1  # a twentieth
    last = read_metrics(tmp_path / "again" / "float-seed0")[-1]["loss"]
    assert rows[0]["loss"] == pytest.approx(last, abs=0.3)


def test_a_float_run_without_the_checkpoint_is_refused_before_it_is_trained(command, tmp_path):
    code, output = run(command(tmp_path / "int4", "--training.keep-every", "None"))
    assert code == 2
    assert f"starts after step 16 of {tmp_path}/float-seed0, which keeps no checkpoint" in " ".join(output.split())
    assert not (tmp_path / "float-seed0").exists()


def test_a_comparison_shares_the_float_runs(command, trained, tmp_path):
    recipe = import_script(ROOT / "recipes" / "qat.py")
    assert list(recipe.configs) == ["cpu", "gpu", "v5e-64"]
    assert [recipe.started(config).training.first_step for config in recipe.configs.values()] == [1800, 4500, 18_000]
    code, output = run(command(tmp_path / "int4", "--compare", "--seeds", "0", "1"))
    assert code == 0, output
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert set(found["variants"]) == {"float", "int4", "int4-fixed-steps"}
    assert {rows["bpb"]["split"] for rows in found["variants"].values()} == {"test"}
    costs = found["cost_share"]
    assert costs["float"] == [0, 0]
    assert all(len(values) == 2 for values in costs.values())
    for seed in (0, 1):
        assert json.loads((tmp_path / f"int4-seed{seed}" / "config.json").read_text())["training"]["resume_from"] == (
            f"{tmp_path}/float-seed{seed}@16"
        )
    assert not list(tmp_path.glob(".*incomplete"))
