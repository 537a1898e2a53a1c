"""The mixture recipe as a user starts it: compared with dense models, and started from one."""

import json
import math
import sys
from pathlib import Path

import pytest
from running import run, run_alone

import efftrain
from efftrain import data
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.cost.parameters import count_parameters
from efftrain.models.decoder import abstract_decoder
from efftrain.recipe import import_script
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.objectives.objective import next_token_loss

ROOT = Path(__file__).parents[2]
STEPS = 6
SMALL = f"""
    --model.vocab-size 300 --model.d-model 16 --model.n-repeats 1 --model.max-length 32
    --model.pattern.0.attention.n-heads 2 --model.pattern.0.attention.n-kv-heads 2
    --model.pattern.0.attention.d-head 8 --training.steps {STEPS} --training.batch-size 4 --training.length 16
""".split()
ROUTED = ["--model.pattern.0.mlp.d-expert", "8"]


def command(recipe: str, corpus: Path, out: Path, *changes: str) -> list[str]:
    script = str(ROOT / "recipes" / recipe)
    return [sys.executable, script, "cpu", "--corpus", str(corpus), "--out", str(out), *SMALL, *changes]


@pytest.fixture(scope="module")
def compared(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "moe"
    for seeds in (["1"], ["0", "1"]):  # the second one finds the runs of the first
        code, output = run_alone(command("moe.py", corpus, out, *ROUTED, "--compare", "dense", "--seeds", *seeds))
        assert code == 0, output
    assert output.count("train: 6/6") == 3
    return out


def test_a_comparison_trains_equal_active_and_twice_the_flops(compared):
    found = json.loads((compared / "comparison-dense.json").read_text())
    assert found["seeds"] == [0, 1]
    assert set(found["variants"]) == {"moe", "dense", "dense-wide"}
    figures = {name: {k: v["mean"] for k, v in row.items()} for name, row in found["variants"].items()}
    router = 16 * 8
    assert figures["moe"]["parameters_active"] == figures["dense"]["parameters_active"] + router
    assert figures["moe"]["parameters_total"] == figures["moe"]["parameters_active"] + 6 * 3 * 16 * 8
    assert 2 <= figures["dense-wide"]["train_flops"] / figures["moe"]["train_flops"] < 2.2
    assert len(found["last_steps"]["moe"]["moe/max_violation"]) == 2
    bpb = found["variants"]["moe"]["bpb"]
    cards = [json.loads((compared / f"moe-seed{i}" / "scorecard.json").read_text()) for i in (0, 1)]
    assert bpb["values"] == [card["figures"]["bpb"]["value"] for card in cards]
    assert bpb["values"][0] != bpb["values"][1]
    gaps = [b - a for a, b in zip(bpb["values"], found["variants"]["dense"]["bpb"]["values"], strict=True)]
    assert found["gain_bpb"] == pytest.approx(sum(gaps) / 2)


@pytest.fixture(scope="module")
def dense(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dense"
    code, output = run(command("dense.py", corpus, out, "--model.pattern.0.mlp.d-ff", "24"))
    assert code == 0, output
    return out


def test_an_upcycled_run_starts_where_the_dense_model_stands(dense, corpus, tmp_path):
    changes = ("--model.pattern.0.mlp.d-expert", "24", "--upcycle", str(dense), "--training.optimizer.peak-lr", "1e-3")
    code, output = run(command("moe.py", corpus, tmp_path / "moe", *changes))
    assert code == 0, output
    loader = data.LoaderConfig(corpora=(data.Part(path=corpus),), length=16, batch_size=4)
    loss, count, _ = next_token_loss(efftrain.load(dense), next(data.batches(loader)), None)
    rows = read_metrics(tmp_path / "moe")
    assert rows[0]["loss"] == pytest.approx(float(loss / count), rel=1e-5)
    assert rows[0]["loss"] < math.log(300) - 0.05  # and that is not where a new model stands


def test_a_dense_run_of_another_shape_is_refused_before_anything_is_made(dense, corpus, tmp_path):
    code, output = run(command("moe.py", corpus, tmp_path / "moe", *ROUTED, "--upcycle", str(dense)))
    assert code == 2, output
    assert "moe.d_expert is 8 and the dense model's d_ff 24" in " ".join(output.split())
    assert not (tmp_path / "moe").exists()


def test_the_named_configurations_have_the_size_that_they_claim():
    configs = import_script(ROOT / "recipes" / "moe.py").configs
    sizes = {name: count_parameters(abstract_decoder(config.model)) for name, config in configs.items()}
    assert sizes["gpu"].active == pytest.approx(125e6, rel=0.03)
    assert sizes["gpu"].total == pytest.approx(380e6, rel=0.05)
    assert sizes["v5e-64"].total == pytest.approx(5.8e9, rel=0.05)
    for config in configs.values():
        assert config.training.length <= config.model.max_length
        assert training_flops(abstract_decoder(config.model), config.training.length) > 0
