"""Pruning as a user has it: the recipe, then ``efftrain compress``, killed, repeated, given bad input."""

import hashlib
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import compress, logits, run, run_alone, start

import efftrain
from efftrain.compress.layerwise.second_order import DAMPING
from efftrain.measure.cost.parameters import count_parameters
from efftrain.models.zeros import zeros_share
from efftrain.recipe import import_script
from efftrain.train.metrics.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 20
SMALL = f"""
    --model.vocab-size 300 --model.d-model 16 --model.n-repeats 4 --model.max-length 32
    --model.pattern.0.attention.n-heads 4 --model.pattern.0.attention.n-kv-heads 4
    --model.pattern.0.attention.d-head 4 --model.pattern.0.mlp.d-ff 64
    --training.steps {STEPS} --training.batch-size 4 --training.length 16
    --training.checkpoint-every 5 --training.keep-every 5
""".split()


@pytest.fixture(scope="module")
def command(corpus):
    def make(out: Path, *changes: str) -> list[str]:
        script = str(ROOT / "recipes" / "prune.py")
        return [sys.executable, script, "cpu", "--corpus", str(corpus), "--out", str(out), *SMALL, *changes]

    return make


@pytest.fixture(scope="module")
def sparse(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sparse"
    code, output = run_alone(command(out))
    assert code == 0, output
    return out


@pytest.fixture(scope="module")
def dense(sparse) -> Path:
    return sparse.with_name("dense-seed0")


def fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.blake2b(p.read_bytes()).hexdigest() for p in files}


def figures(run: Path) -> dict[str, float]:
    return {n: f["value"] for n, f in json.loads((run / "scorecard.json").read_text())["figures"].items()}


def test_half_of_the_weights_are_gone_and_what_is_stored_is_smaller(sparse, dense):
    assert [row["step"] for row in read_metrics(sparse)] == list(range(11, STEPS + 1))  # behind the dense run's 10
    assert zeros_share(efftrain.load(sparse)) == figures(sparse)["sparsity"] == 0.5
    assert "sparsity" not in figures(dense)
    code, output = compress("quantize", sparse)
    assert code == 0, output
    out = sparse.with_name("sparse-stored")
    np.testing.assert_array_equal(logits(efftrain.load(out)), logits(efftrain.load(sparse)))
    code, output = compress("quantize", dense)
    assert code == 2
    assert "was not trained for quantisation and has no zeros; give a number format" in output


def test_a_dense_run_is_pruned_at_once_and_stays_as_it_is(dense, tmp_path):
    before = fingerprint(dense)
    code, output = compress("prune", dense, "--sparsity", "0.5", "--rows", "8", "--out", tmp_path / "half")
    assert code == 0, output
    model, report = efftrain.load(tmp_path / "half"), json.loads((tmp_path / "half" / "compression.json").read_text())
    assert zeros_share(model) == figures(tmp_path / "half")["sparsity"] == 0.5
    assert {m["method"] for m in report["matrices"]} == {"sparsegpt"}
    assert report["bytes_share"] == pytest.approx(0.5 + 1 / 32)
    length = json.loads((dense / "config.json").read_text())["training"]["length"]
    assert report["calibration"] == {"rows": 8, "rows_asked": 8, "tokens": 8 * length}
    assert {m["damping"] for m in report["matrices"]} == {DAMPING}
    assert report["bpb"] != report["bpb_before"]
    arguments = ("--sparsity", "2:4", "--method", "sparsegpt", "--weights", "int4:g8", "--rows", "8")
    code, output = compress("prune", dense, *arguments, "--out", tmp_path / "both")
    assert code == 0, output
    assert efftrain.load(tmp_path / "both").config.quantization.stored
    report = json.loads((tmp_path / "both" / "compression.json").read_text())
    assert all(m["sparsity"] >= 0.5 and m["format"] == "int4:g8" for m in report["matrices"])
    assert fingerprint(dense) == before


def test_a_cut_model_is_smaller_and_its_training_goes_on_when_it_was_killed(dense, tmp_path):
    before, out = fingerprint(dense), tmp_path / "smaller"
    arguments = ("--ratio", "0.3", "--recovery-tokens", 64 * 40, "--rows", "8", "--out", out)
    process = start([sys.executable, "-m", "efftrain.cli", "compress", "structured", str(dense), *map(str, arguments)])
    while process.poll() is None and not (out / "checkpoints" / "10").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cut = fingerprint(tmp_path / "smaller.stages" / "1-cut")
    code, output = compress("structured", dense, *arguments)
    assert code == 0, output
    assert "continuing from step" in output or "is trained already" in output
    assert fingerprint(tmp_path / "smaller.stages" / "1-cut") == cut
    assert fingerprint(dense) == before
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 41))
    peak = max(row["lr"] for row in read_metrics(dense))
    assert max(row["lr"] for row in rows) == pytest.approx(0.6 * peak, rel=0.05)
    model, whole = efftrain.load(out), efftrain.load(dense)
    assert count_parameters(model).total <= 0.7 * count_parameters(whole).total
    assert model.config.n_layers == whole.config.n_layers
    report = json.loads((tmp_path / "smaller.stages" / "1-cut" / "compression.json").read_text())
    assert report["structured"]["after"]["parameters"] == count_parameters(model).total
    code, output = compress("structured", dense, *arguments)
    assert code == 0
    assert "nothing to do" in output
    fewer = ("--ratio", "0.3", "--recovery-tokens", 64 * 20, "--rows", "8", "--out", out)
    code, output = compress("structured", dense, *fewer)
    assert code == 2
    assert "holds a run with another configuration" in " ".join(output.split())


def test_rounds_reach_the_target_in_equal_shares(dense, tmp_path):
    out = tmp_path / "rounds"
    recovery = ("--recovery-tokens", 64 * 10, "--rounds", "2")
    arguments = ("--sparsity", "0.5", "--method", "magnitude", *recovery, "--rows", "8")
    code, output = compress("prune", dense, *arguments, "--out", out)
    assert code == 0, output
    stages = tmp_path / "rounds.stages"
    shares = [zeros_share(efftrain.load(stages / name)) for name in ("1-cut", "1-recovered", "2-cut")]
    assert shares == pytest.approx([1 - 0.5**0.5, 1 - 0.5**0.5, 0.5], abs=2e-3)
    assert zeros_share(efftrain.load(out)) == 0.5
    first, second = read_metrics(stages / "1-recovered"), read_metrics(out)
    assert len(first) == len(second) == 5
    assert first[0]["loss"] != second[0]["loss"]
    assert max(row["lr"] for row in first) == max(row["lr"] for row in second)


def test_a_recovered_run_of_a_fork_loads(dense, tmp_path):
    """Its class stands in the run's own recipe; averages of the run are no matter for so few steps."""
    run = tmp_path / "fork"
    shutil.copytree(dense, run)
    config = json.loads((run / "config.json").read_text())
    config["model"]["pattern"][0]["mlp"]["type"] = "recipe.py:Odd"
    config["training"]["ema_decay"] = 0.999
    (run / "config.json").write_text(json.dumps(config))
    (run / "recipe.py").write_text(
        "from dataclasses import dataclass\nfrom efftrain.models.config import Dense\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Odd(Dense):\n    pass\n"
    )
    before = fingerprint(run)
    recovery = ("--recovery-tokens", 64 * 10, "--rounds", "2")
    arguments = ("--ratio", "0.3", *recovery, "--rows", "8", "--out", tmp_path / "out")
    code, output = compress("structured", run, *arguments)
    assert code == 0, output
    assert type(efftrain.load(tmp_path / "out").config.pattern[0].mlp).__name__ == "Odd"
    assert fingerprint(run) == before
    assert json.loads((tmp_path / "out" / "config.json").read_text())["training"]["ema_decay"] is None
    cut, tuned = (efftrain.load(tmp_path / name) for name in ("out.stages/2-cut", "out"))
    assert np.abs(logits(cut) - logits(tuned)).max() > 1e-3


def test_a_search_takes_the_shape_that_is_best_after_a_short_training(dense, tmp_path):
    out = tmp_path / "best"
    arguments = ("--ratio", "0.3", "--axis", "any", "--search", "2", "--recovery-tokens", 64 * 20, "--rows", "8")
    code, output = compress("structured", dense, *arguments, "--out", out)
    assert code == 0, output
    folder = tmp_path / "best.stages" / "1-search"
    found = json.loads((folder / "shapes.json").read_text())
    assert [figures(folder / str(i))["bpb"] for i in (1, 2)] == found["bpb"]
    assert [len(read_metrics(folder / str(i))) for i in (1, 2)] == [2, 2]
    best = found["shapes"][int(np.argmin(found["bpb"]))]
    code, output = compress("structured", dense, *arguments, "--out", out)  # again: nothing is cut or trained
    assert code == 0, output
    assert json.loads((folder / "shapes.json").read_text()) == found
    config = efftrain.load(out).config
    assert (config.d_model, config.n_layers) == (best["d_model"], best["n_layers"])


def test_bad_input_is_one_sentence(dense, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = sorted(p.name for p in dense.parent.iterdir())
    cases = {
        ("prune", "--sparsity", "1.5"): "sparsity is 1.5; it is the share of weights to remove",
        ("prune", "--sparsity", "3:5", "--method", "magnitude"): "groups of 5 do not divide its 16 inputs",
        ("prune", "--sparsity", "0.5", "--weights", "int8", "--layers", "blocks/.*|embedding"): (
            "only blocks are quantised"
        ),
        ("prune", "--sparsity", "0.5", "--out", tmp_path / "mine"): "exists and is not a converted model",
        ("structured", "--ratio", "0.99"): "keep is",
        ("structured", "--ratio", "0.3", "--search", "2", "--recovery-tokens", "500"): (
            "--recovery-tokens leaves 50 tokens for each round or trial"
        ),
        ("structured", "--ratio", "0.3", "--recovery-tokens", "10"): (
            "--recovery-tokens leaves 10 tokens for each round or trial, and one step takes 64"
        ),
        ("structured", "--ratio", "0.3", "--recovery-tokens", "640", "--out", tmp_path / "mine"): (
            "was not made by this command"
        ),
    }
    for (command, *arguments), message in cases.items():
        code, output = compress(command, dense, *arguments)
        assert (code, "Traceback" in output) == (2, False), output
        assert message in " ".join(output.split()), output
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in dense.parent.iterdir()) == before


def test_the_recipe_compares_everything_it_says(command, tmp_path):
    recipe = import_script(ROOT / "recipes" / "prune.py")
    assert list(recipe.configs) == ["cpu", "gpu"]
    changes = ("--training.steps", "60", "--compare", "--seeds", "0")
    code, output = run(command(tmp_path / "sparse", *changes))
    assert code == 0, output
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert set(found["variants"]) == {"dense", "sparse", "sparse-2of4"}
    seed = found["seeds"]["0"]
    assert set(seed["at_once"]) >= {"dense", "half, magnitude", "half, wanda", "half, sparsegpt", "2of4, sparsegpt"}
    assert seed["tuned"].keys() >= set(recipe.cuts(recipe.cpu)) | {"width33-scratch"}
    whole = seed["tuned"]["magnitude"]["parameters_total"]
    assert seed["tuned"]["width33"]["parameters_total"] <= 0.67 * whole
    assert seed["tuned"]["width33-scratch"]["parameters_total"] == seed["tuned"]["width33"]["parameters_total"]
    assert seed["latency"].keys() == {"dense", "width33", "depth28", "width50-2rounds"}
