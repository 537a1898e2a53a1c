"""A model with a number that is not finite is refused by every command, in one sentence that names the matrix."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import LOCAL, PLAIN, build, config
from tiny_runs import LENGTH, VOCABULARY, write_corpus, write_run

import efftrain
from efftrain import data
from efftrain.compress.commands.prune import Prune
from efftrain.compress.commands.quantize import Quantize
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.structured_prune import StructuredPrune
from efftrain.compress.distillation.build_teacher_cache import CacheOptions, build_cache
from efftrain.compress.distillation.distill import teacher_run
from efftrain.compress.run import compress
from efftrain.config import finite_json, from_json, to_json
from efftrain.data.rules.score_table import ScoreTable
from efftrain.errors import RunError
from efftrain.experiment.compare import Comparison
from efftrain.measure.depth.calibrate_depth import DepthCalibration, calibrate
from efftrain.measure.measurements import Measurements, write_json
from efftrain.measure.scorecard.scorecard import Figure, Scorecard, not_measured
from efftrain.models.moe import MoE
from efftrain.recipe import import_script
from efftrain.train.config import Training
from efftrain.train.run.directory import Run

MODEL = config(vocab_size=VOCABULARY, pattern=(PLAIN, LOCAL), n_repeats=2, max_length=32)
TRAINING = Training(steps=40, batch_size=8, length=LENGTH)


def upcycled(run: Path) -> None:
    recipe = import_script(Path(__file__).parents[2] / "recipes" / "moe.py")
    pattern = tuple(replace(block, mlp=MoE(n_experts=2, d_expert=block.mlp.d_ff)) for block in MODEL.pattern)
    model, corpus = MODEL.replace(pattern=pattern), run.parent / "text" / "corpus"
    config = replace(recipe.configs["cpu"], model=model, training=TRAINING, corpus=corpus)
    recipe.main(replace(config, upcycle=run, out=run.parent / "moe"))


TWO_ROUNDS = RecoveryTraining(tokens=4096, rounds=2)
COMMANDS = {
    "upcycle": upcycled,
    "int8": lambda run: compress(run, Quantize(weights="int8")),
    "gptq": lambda run: compress(run, Quantize(weights="int8", method="gptq", rows=2)),
    "budget": lambda run: compress(run, Quantize(weights="int8,int4:g4", budget=0.2, rows=2)),
    "magnitude": lambda run: compress(run, Prune(sparsity="0.5", method="magnitude")),
    "structured": lambda run: compress(run, StructuredPrune(ratio=0.3, rows=2)),
    "rounds": lambda run: compress(run, StructuredPrune(ratio=0.3, rows=2, recovery=TWO_ROUNDS)),
    "teacher": lambda run: build_cache(run, CacheOptions(rows=2)),
    "calibrate-depth": lambda run: calibrate(run, DepthCalibration(rows=6, risk=0.9, error=0.5)),
    "load": efftrain.load,
    "distil": lambda run: teacher_run(run, run.parent / "text" / "corpus"),
}


def spoiled(value: float):
    """Four layers in a pattern of two; the number stands in layer 2, the second repeat of position 0."""
    model = build(MODEL)
    kernel = model.blocks[0].mlp.down.kernel
    kernel[...] = kernel[...].at[1, 3, 5].set(value)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").mkdir()
    return write_run(folder / "run", spoiled(math.nan), write_corpus(folder / "text"), TRAINING)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_matrix_and_leaves_nothing(run, command):
    def files() -> list:
        return sorted(path.relative_to(run.parent) for path in run.parent.rglob("*"))

    before = files()
    with pytest.raises(RunError, match=r"40: mlp/down/kernel of layer 2 holds numbers that are not finite") as error:
        COMMANDS[command](run)
    assert "\n" not in str(error.value)
    assert files() == before


def test_such_a_model_can_be_looked_at(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    infinite = write_run(tmp_path / "infinite", spoiled(-math.inf), data.open(config["corpus"]), TRAINING)
    with pytest.raises(RunError, match="mlp/down/kernel of layer 2"):
        efftrain.load(infinite)
    model = efftrain.load(run, finite=False)
    assert np.argwhere(~np.isfinite(model.blocks[0].mlp.down.kernel[...])).tolist() == [[1, 3, 5]]


def strict(path):
    """As a reader that knows JSON alone."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path} holds {name}"))


def test_no_file_holds_what_json_has_no_word_for(tmp_path):
    values = {"bpb": math.nan, "errors": [1.0, -math.inf], "deep": {"bpb": math.inf, "n": 3, "of": "nan"}}
    plain = {"bpb": None, "errors": [1.0, None], "deep": {"bpb": None, "n": 3, "of": "nan"}}
    assert finite_json(values) == plain
    write_json(tmp_path / "compression.json", values)
    Run(tmp_path / "run", TRAINING).write_json("training.json", values)
    Scorecard("diverged", {}, values).write(tmp_path / "scorecard.json")
    assert strict(tmp_path / "compression.json") == strict(tmp_path / "run" / "training.json") == plain
    assert strict(tmp_path / "scorecard.json")["environment"] == plain
    kept = Measurements(tmp_path / "choice.json", {}, {})
    assert kept.cell("bpb", lambda: math.nan) is None
    assert strict(tmp_path / ".choice.json.incomplete")["cells"] == {"bpb": None}


def test_a_comparison_with_a_run_that_diverged_is_written(tmp_path):
    cards = [Scorecard("a", {"bpb": Figure(1.5, "bits/byte", "measured")}, {})]
    cards += [Scorecard("b", {"bpb": not_measured("bits/byte", "the computed value is nan")}, {})]
    found = Comparison((0, 1), {"moe": cards, "dense": [cards[0]] * 2}, {"moe": {}, "dense": {}})
    gain, spread = found.gap("moe", "dense")
    found.write(tmp_path / "comparison.json", gain=gain, spread=spread, mean=found.mean("dense", "bpb"))
    read = strict(tmp_path / "comparison.json")
    assert (read["gain"], read["spread"], read["mean"]) == (None, None, 1.5)


def test_a_configuration_keeps_its_infinities():
    rule = ScoreTable(table=Path("scores"), digest="", low=-math.inf, high=math.inf)
    value = json.loads(json.dumps(to_json(rule), allow_nan=False))
    assert (value["low"], value["high"]) == ("-inf", "inf")
    assert from_json(value) == rule
