"""What students keep of their teacher's gain over a unigram model."""

from pathlib import Path

import pytest
from tiny_models import PLAIN, build, config
from tiny_runs import LENGTH, VOCABULARY, write_corpus, write_run

import efftrain
from efftrain.compress.distillation.teacher_gain import teacher_gain
from efftrain.errors import RunError
from efftrain.experiment.compare import Comparison
from efftrain.experiment.experiment import Experiment
from efftrain.measure.cost.objective_flops import forward_flops
from efftrain.measure.quality.held_out import reporting
from efftrain.measure.quality.unigram import unigram_bpb
from efftrain.measure.scorecard.scorecard import FILE_NAME, Figure, Scorecard
from efftrain.train.config import Training

MODEL = config(vocab_size=VOCABULARY, pattern=(PLAIN,), n_repeats=2, max_length=32)
TRAINING = Training(steps=40, batch_size=8, length=LENGTH)


def card(bpb: float, parameters: int) -> Scorecard:
    figures = {
        "bpb": Figure(bpb, "bits/byte", "measured", split="train"),
        "parameters_total": Figure(parameters, "parameters", "counted"),
    }
    return Scorecard("run", figures, {})


def test_shares_are_those_of_the_rows_that_a_comparison_reports_on(tmp_path):
    corpus = write_corpus(tmp_path)
    teacher = write_run(tmp_path / "teacher", build(MODEL), corpus, TRAINING)
    student = Experiment(model=MODEL, training=TRAINING, corpus=corpus.path, out=Path("unused"))
    found = Comparison((0, 1), {"text": [card(3.0, 10), card(2.9, 10)], "samples": [card(2.5, 10), card(2.4, 10)]}, {})
    with pytest.raises(RunError, match=r"there is no scorecard \S+; give the directory of a run that has finished"):
        teacher_gain(found, teacher, student)
    card(9.0, 100).write(teacher / FILE_NAME)
    result = teacher_gain(found, teacher, student)
    expected = reporting(corpus.path, LENGTH, batch_size=8).evaluator(8)(efftrain.load(teacher))["bpb"]
    unigram = unigram_bpb(corpus, split="validation")
    assert result["teacher_bpb"] == pytest.approx(expected)
    assert result["unigram_bpb"] == unigram
    assert result["parameters"] == {"teacher": 100, "student": 10}
    assert result["kept_share_of_gain"]["samples"][1] == pytest.approx((unigram - 2.4) / (unigram - expected))
    assert list(result["kept_share_of_gain"]) == ["text", "samples"]
    assert result["teacher_flops_per_token"] == forward_flops(MODEL, LENGTH)
