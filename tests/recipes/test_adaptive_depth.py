"""The recipe of adaptive depth as a user starts it, compared with a plain model, and a run that is calibrated."""

import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import run, run_alone

import efftrain
from efftrain import data
from efftrain.config import from_json
from efftrain.errors import ConfigError, RunError
from efftrain.measure.cost.parameters import count_parameters
from efftrain.measure.depth.depth_calibration import Calibrated, read_calibration
from efftrain.models.decoder import abstract_decoder
from efftrain.models.decoding.generate import generate
from efftrain.models.depth.early_exit import ConfidenceExit, exit_states
from efftrain.models.depth.routed_depth import causally_routed
from efftrain.ops.cross_entropy import token_nll
from efftrain.recipe import import_script
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.run.directory import read_json

ROOT = Path(__file__).parents[2]
SMALL = (
    "--model.vocab-size 300 --model.d-model 16 --model.max-length 32 --training.steps 12 --training.batch-size 4 "
    "--training.length 16 --training.optimizer.peak-lr 1e-2"
)
LAYERSKIP = (
    "--model.n-repeats 4 --exits.after 3 --model.layer-dropout.after 3 --model.layer-dropout.rate 0.9 "
    "--compare plain --seeds 0"
)
BLOCK = "--model.pattern.{i}.attention.n-heads 2 --model.pattern.{i}.attention.n-kv-heads 2"
BLOCK += " --model.pattern.{i}.attention.d-head 8 --model.pattern.{i}.mlp.d-ff 24"


def command(name: str, corpus: Path, out: Path, *changes: str, blocks: int = 1) -> list[str]:
    script = str(ROOT / "recipes" / "adaptive_depth.py")
    sizes = [word for i in range(blocks) for word in BLOCK.format(i=i).split()]
    return [sys.executable, script, name, "--corpus", str(corpus), "--out", str(out), *SMALL.split(), *sizes, *changes]


@pytest.fixture(scope="module")
def layerskip(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "layerskip"
    code, output = run_alone(command("layerskip", corpus, out, *LAYERSKIP.split()))
    assert code == 0, output
    return out / "layerskip-seed0"


@pytest.fixture(scope="module")
def mixture(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mixture"
    changes = ("--model.n-repeats", "1", "--compare", "plain", "--seeds", "0")
    code, output = run(command("mixture-of-depths", corpus, out, *changes, blocks=2))
    assert code == 0, output
    return out


CALIBRATE = "--exits 1 --drafts 2 3 --prompts 2 --n-new 6 --rows 72 --risk 0.9 --error 0.5"


def calibrate(run_directory: Path, *more: str) -> tuple[int, str]:
    return run([sys.executable, "-m", "efftrain.cli", "calibrate-depth", str(run_directory), *CALIBRATE.split(), *more])


@pytest.fixture(scope="module")
def calibrated(layerskip) -> Path:
    code, output = calibrate(layerskip)
    assert code == 0, output
    return layerskip


def test_layerskip_trains_exits_and_leaves_layers_out(layerskip):
    rows = read_metrics(layerskip)
    assert [row["loss/exits"] is None for row in rows] == [step < 3 for step in range(12)]
    kept = [row["depth/kept"] for row in rows]
    assert kept[:3] == [1, 1, 1]
    assert min(kept) < 1
    assert set(kept) <= {i / 4 for i in range(5)}
    assert int(efftrain.load(layerskip).steps[...]) == 12
    card = json.loads((layerskip / "scorecard.json").read_text())["figures"]
    assert "in the objective" in card["train_flops_per_token"]["note"]
    script = import_script(ROOT / "recipes" / "adaptive_depth.py")
    config = from_json(read_json(layerskip / "config.json"), script=script)
    assert card["train_flops_per_token"]["value"] == pytest.approx(script.flops_per_token(config))


def test_switched_off_it_is_the_same_run_until_exits_begin(layerskip):
    """To the bit, and another one from there on."""
    losses = {
        name: [row["loss"] for row in read_metrics(layerskip.with_name(f"{name}-seed0"))]
        for name in ("layerskip", "layerskip-off")
    }
    with_exits, without = losses.values()
    assert with_exits[:3] == without[:3]
    assert with_exits[3:] != without[3:]
    found = json.loads((layerskip.parent / "comparison-layerskip.json").read_text())
    on, off = (found["variants"][name]["bpb"]["mean"] for name in ("layerskip", "layerskip-off"))
    assert found["cost_bpb"] == pytest.approx(on - off)
    assert found["train_flops_share"] == pytest.approx(1, abs=0.06)


def test_a_comparison_is_at_equal_flops(mixture):
    found = json.loads((mixture / "comparison-mixture-of-depths.json").read_text())
    assert found["train_flops_share"] == pytest.approx(1, abs=0.06)  # a step of so few is 5 %
    assert found["forward_flops_share"] < 1
    figures = found["variants"]["mixture-of-depths"]
    assert figures["bpb"]["values"] != figures["bpb_look_ahead"]["values"]
    assert 1 <= figures["mean_depth"]["mean"] <= 2
    assert found["variants"]["plain"]["parameters_total"]["mean"] < figures["parameters_total"]["mean"]  # the routers


def test_a_calibration_is_what_it_says(calibrated, corpus):
    found = json.loads((calibrated / "depth.json").read_text())
    grid = found["self_speculation"]["grid"]
    assert [(cell["exit_layer"], cell["n_draft"]) for cell in grid] == [(1, 2), (1, 3)]
    assert all(cell["identical"] and 0 <= cell["acceptance"] <= 1 for cell in grid)
    faster = [cell["speedup"] for cell in grid if cell["speedup"] > 1]
    assert found["self_speculation"].get("speedup") == max(faster, default=None)
    for rule in ("similarity", "gap", "probe"):
        curve = found["confidence_exit"][rule]["curve"]
        assert curve[0]["mean_depth"] == 4
        assert curve[0]["differs"] == 0
        assert curve[-1]["mean_depth"] < 4
        best = found["confidence_exit"][rule]["within_quality_loss"]
        assert best["bpb"] <= 1.01 * curve[0]["bpb"]
        for point in curve:
            classes = point["histogram_by_class"]
            assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in classes.values())
    assert set(found["seconds"]) == {"batch 1", "batch 8"}
    card = json.loads((calibrated / "scorecard.json").read_text())["figures"]
    assert 1 <= card["mean_depth"]["value"] <= 4
    assert card["mean_depth_word"]["unit"] == "layers/token"
    assert card["decode_flops_per_token_exit"]["value"] <= card["decode_flops_per_token"]["value"] * 1.01
    assert ("decode_s_per_token_b1_speculative" in card) == bool(faster)
    assert "tokens by layers" in card["mean_depth_word"]["note"]
    point = found["report"]["confidence_exit"][found["chosen_rule"]]["within_quality_loss"]
    assert (card["mean_depth"]["value"], card["mean_depth"]["split"]) == (point["mean_depth"], "test")
    assert not list(calibrated.glob("*incomplete*"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_point_is_the_bits_per_byte_of_its_threshold(calibrated, corpus, split):
    """Put together again from whole rows, with another pass: of the curve that chooses, and of the report."""
    found = json.loads((calibrated / "depth.json").read_text())
    model, opened = efftrain.load(calibrated), data.open(corpus)
    assert (found["chosen_on"]["split"], found["report"]["split"]) == ("validation", "test")
    chosen = found["confidence_exit"]["similarity"]["within_quality_loss"]
    point = chosen if split == "validation" else found["report"]["confidence_exit"]["similarity"]["within_quality_loss"]
    assert point["threshold"] == chosen["threshold"]
    exit_ = ConfidenceExit(rule="similarity", threshold=point["threshold"])
    loader = data.LoaderConfig(
        corpora=(data.Part(path=corpus),), length=16, batch_size=8, split=split, shuffle=False, repeat=False
    )
    first = 3 if split == "validation" else 0  # a third of the 72 rows tunes
    nats = n_bytes = 0
    for row in itertools.islice(data.batches(loader), first, first + 6):
        where = {"segments_bt": row["segments"], "positions_bt": row["positions"]}
        state = exit_states(model, row["tokens"], exit_, exit_.threshold, **where)
        nll = token_nll(model.exit_logits(state.x_btd), row["targets"])
        nats += float((nll * row["mask"]).sum())
        n_bytes += opened.token_bytes()[row["targets"]][row["mask"]].sum()
    assert point["bpb"] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-4)


def test_what_was_calibrated_decodes(calibrated):
    model = efftrain.load(calibrated)
    found = read_calibration(calibrated, model)
    prompts, lengths = np.array([[5, 6, 7, 8]], np.int32), np.array([4])
    plain = generate(model, prompts, lengths, n_new=8)
    # Which drafts are worth it at this size is the machine's mood.
    best = Calibrated(found.values | {"self_speculation": found.values["self_speculation"]["grid"][0]}, None)
    np.testing.assert_array_equal(generate(model, prompts, lengths, n_new=8, depth=best.speculation()), plain)
    none = Calibrated(found.values | {"self_speculation": {"exit_layer": None}}, None)
    with pytest.raises(ConfigError, match="no draft that is faster than plain decoding"):
        none.speculation()
    generate(model, prompts, lengths, n_new=8, depth=found.exit("probe"), probe=found.probe)
    with pytest.raises(ConfigError, match="has no rule 'hope'; use one of similarity, gap, probe"):
        found.exit("hope")


def test_an_interrupted_calibration_goes_on(calibrated, corpus, tmp_path):
    """What was measured is taken as it is, for the same model and options only."""
    copy = tmp_path / "run"
    shutil.copytree(calibrated, copy)
    values = json.loads((copy / "depth.json").read_text())
    cells = {"draft 2 with 1": values["self_speculation"]["grid"][0] | {"speedup": 99.0}}
    same = {name: values[name] for name in ("model", "options", "corpus", "code")}
    (copy / ".depth.json.incomplete").write_text(json.dumps(same | {"cells": cells}))
    code, output = calibrate(copy, "--corpus", str(corpus))
    assert code == 0, output
    assert json.loads((copy / "depth.json").read_text())["self_speculation"]["speedup"] == 99


def test_routed_depth_is_told_by_class(mixture):
    directory = mixture / "mixture-of-depths-seed0"
    code, output = calibrate(directory)
    assert code == 0, output
    depths = json.loads((directory / "depth.json").read_text())["routed_depth"]
    assert 1 <= depths["mean_depth"] <= 2
    card = json.loads((directory / "scorecard.json").read_text())["figures"]
    assert card["mean_depth"]["value"] == depths["mean_depth"]
    with pytest.raises(ConfigError, match=r"is of a model of routed depth"):
        read_calibration(directory, efftrain.load(directory)).speculation()


def test_another_models_calibration_is_refused(calibrated, mixture):
    other = efftrain.load(mixture / "plain-seed0")
    with pytest.raises(RunError, match="was measured on another model"):
        read_calibration(calibrated, other)
    with pytest.raises(RunError, match=r"make it with: efftrain calibrate-depth"):
        read_calibration(mixture / "plain-seed0", other)
    code, output = calibrate(calibrated, "--exits", "4")
    assert code == 2
    assert "exit_layer is 4 and the model has 4 layers" in " ".join(output.split())
    code, output = calibrate(calibrated, "--risk", "0.01")
    assert code == 2
    assert "calibration.rows is 72, too few to show a risk of 0.01" in " ".join(output.split())
    code, output = calibrate(calibrated, "--rows", "60000")
    assert code == 2
    assert "give fewer --rows" in " ".join(output.split())


def test_what_was_calibrated_stays_on_the_card(calibrated, corpus):
    """The comparison and the run are started again, with nothing left to train."""
    out = calibrated.parent
    code, output = run(command("layerskip", corpus, out, *LAYERSKIP.split()))
    assert code == 0, output
    assert "mean_depth" in json.loads((calibrated / "scorecard.json").read_text())["figures"]


def test_exits_that_would_never_begin_are_refused(corpus, tmp_path):
    code, output = run(command("layerskip", corpus, tmp_path / "run", "--model.n-repeats", "4"))
    assert code == 2
    assert "exits.after is 400 and the run has 12 steps; give fewer" in " ".join(output.split())


def test_bits_per_byte_are_those_of_decoding(mixture, corpus):
    """The figure of a model that looks ahead in training is that of its own choices: summed up by hand, of the split
    that a comparison reports on."""
    directory = mixture / "mixture-of-depths-seed0"
    opened = data.open(corpus)
    held_out = data.LoaderConfig(
        corpora=(data.Part(path=corpus),), length=16, batch_size=4, split="test", shuffle=False, repeat=False
    )
    ahead, n_bytes = efftrain.load(directory), 0
    causal, nats = causally_routed(ahead), {"bpb": 0.0, "bpb_look_ahead": 0.0}
    for row in data.batches(held_out):
        n_bytes += opened.token_bytes()[row["targets"]][row["mask"]].sum()
        for name, model in (("bpb", causal), ("bpb_look_ahead", ahead)):
            logits = model(row["tokens"], segments_bt=row["segments"], positions_bt=row["positions"])
            nats[name] += float((token_nll(logits, row["targets"]) * row["mask"]).sum())
    card = json.loads((directory / "scorecard.json").read_text())["figures"]
    for name, total in nats.items():
        assert card[name]["value"] == pytest.approx(total / np.log(2) / n_bytes, rel=1e-4)
        assert card[name]["split"] == "test"


def test_the_named_configurations_cost_the_same():
    script = import_script(ROOT / "recipes" / "adaptive_depth.py")
    for size, named in script.sizes.items():
        plain = named["plain"]
        flops = plain.training.steps * script.flops_per_token(plain)
        assert plain.training.length <= plain.model.max_length
        for name, config in named.items():
            assert config.training.steps * script.flops_per_token(config) == pytest.approx(flops, rel=2e-3), name
            if size == "":  # the comparisons share their plain runs
                assert script.plain_of(config).training == plain.training
                assert script.plain_of(config).model == plain.model
        dense, looped = (
            count_parameters(abstract_decoder(named[n].model)).non_embedding for n in ("plain", "recursion")
        )
        assert looped < 0.55 * dense
    layerskip = script.sizes[""]["layerskip"]
    assert script.flops_per_token(layerskip) > script.flops_per_token(replace(layerskip, exits=None))
