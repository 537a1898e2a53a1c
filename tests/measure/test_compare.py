"""Comparisons: which runs are made, what is read again, means and spreads, and FLOPs at equal quality."""

import json
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from efftrain import code_identity
from efftrain.errors import RunError
from efftrain.experiment.compare import compare as compare_on_test
from efftrain.experiment.compare import equal_quality_flops
from efftrain.experiment.experiment import Experiment
from efftrain.measure.scorecard.scorecard import FILE_NAME, Figure, Scorecard, not_measured
from efftrain.models.config import llama
from efftrain.train.config import Training
from efftrain.train.inputs import input_contents
from efftrain.train.run.directory import Run

MODEL = llama(vocab_size=32, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_length=8)
BASE = Experiment(
    model=MODEL, training=Training(steps=2, batch_size=2, length=8), corpus=Path("corpus"), out=Path("unused")
)
VARIANTS = {"narrow": BASE, "wide": replace(BASE, model=MODEL.replace(d_model=16))}
BPB = {("narrow", 0): 2.0, ("narrow", 1): 2.2, ("wide", 0): 1.9, ("wide", 1): 2.0}


compare = partial(compare_on_test, report=lambda card, config: card)  # these runs have neither model nor corpus


@dataclass
class Trainer:
    """Leaves what a run leaves."""

    out: Path
    fail_at: int | None = None

    def __post_init__(self):
        self.trained: list[str] = []

    def __call__(self, config: Experiment) -> Scorecard:
        if len(self.trained) == self.fail_at:
            raise KeyboardInterrupt
        run = Run(config.out, config, inputs=input_contents(config))
        self.trained.append(run.path.name)
        variant, seed = run.path.name.split("-seed")
        assert config.training.seed == int(seed)
        (run.path / "metrics.jsonl").write_text(
            json.dumps({"step": 2, "split": "train", "loss": 3.0 + int(seed)}) + "\n"
        )
        bpb = BPB[variant, int(seed)]
        figures = {
            "bpb": Figure(bpb, "bits/byte", "measured"),
            "train_flops": Figure(1e12 * config.model.d_model, "FLOP", "counted"),
            "mfu": not_measured("share", "a CPU"),
        }
        blank = {"train_tokens_per_s", "parameters_active", "parameters_total", "decode_s_per_token_b1"}
        card = Scorecard(run.path.name, figures | {name: not_measured("s", "") for name in blank}, {"cpu": "fake"})
        card.write(run.path / FILE_NAME)
        (run.path / "training.json").write_text("{}")
        return card


@pytest.mark.smoke
def test_every_variant_runs_with_every_seed_and_is_summed_up(tmp_path):
    train = Trainer(tmp_path)
    found = compare(VARIANTS, train, out=tmp_path, seeds=(0, 1))
    assert train.trained == ["narrow-seed0", "wide-seed0", "narrow-seed1", "wide-seed1"]
    assert found.mean("narrow", "bpb") == pytest.approx(2.1)
    assert found.spread("narrow", "bpb") == pytest.approx(statistics.stdev([2.0, 2.2]))
    gain, spread = found.gap("wide", "narrow")
    assert (gain, spread) == (pytest.approx(0.15), pytest.approx(statistics.stdev([0.1, 0.2])))
    found.write(tmp_path / "comparison.json", more=1)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["variants"]["wide"]["bpb"]["values"] == [1.9, 2.0]
    assert written["variants"]["wide"]["bpb"]["method"] == "measured"
    assert "mfu" not in written["variants"]["wide"]
    assert written["last_steps"]["narrow"]["loss"] == [3.0, 4.0]
    assert written["more"] == 1


def test_an_interrupted_comparison_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compare(VARIANTS, Trainer(tmp_path, fail_at=3), out=tmp_path, seeds=(0, 1))
    again = Trainer(tmp_path)
    found = compare(VARIANTS, again, out=tmp_path, seeds=(0, 1))
    assert again.trained == ["wide-seed1"]
    assert found.mean("wide", "bpb") == pytest.approx(1.95)


def test_finished_runs_of_another_configuration_are_refused(tmp_path):
    compare(VARIANTS, Trainer(tmp_path), out=tmp_path, seeds=(0,))
    changed = {"narrow": replace(BASE, model=MODEL.replace(n_repeats=2))}
    with pytest.raises(RunError, match="narrow-seed0 holds a run with another configuration"):
        compare(changed, Trainer(tmp_path), out=tmp_path, seeds=(0,))


def test_finished_runs_of_other_code_are_refused(tmp_path, monkeypatch):
    """Their figures would stand beside those of this code as if only the variants differed."""
    compare(VARIANTS, Trainer(tmp_path), out=tmp_path, seeds=(0,))
    before = (tmp_path / "narrow-seed0" / "environment.json").read_bytes()
    compare(VARIANTS, Trainer(tmp_path), out=tmp_path, seeds=(0,))
    assert (tmp_path / "narrow-seed0" / "environment.json").read_bytes() == before
    monkeypatch.setattr(code_identity, "package_identity", lambda rooms: "another version")
    with pytest.raises(RunError, match=r"narrow-seed0 was trained with other code \(changed since: efftrain\)"):
        compare(VARIANTS, Trainer(tmp_path), out=tmp_path, seeds=(0,))


def test_finished_runs_of_a_corpus_that_was_built_anew_are_refused(tmp_path):
    def corpus(tokens: str) -> Path:
        (tmp_path / "manifest.json").write_text(json.dumps({"files": {"tokens/0": {"blake2b": tokens}}}))
        return tmp_path

    def variants() -> dict[str, Experiment]:
        return {"narrow": replace(BASE, corpus=corpus(tokens))}

    tokens = "a"
    compare(variants(), Trainer(tmp_path), out=tmp_path / "runs", seeds=(0,))
    tokens = "b"
    with pytest.raises(RunError, match=r"narrow-seed0 holds a run .* the contents of corpus have changed"):
        compare(variants(), Trainer(tmp_path), out=tmp_path / "runs", seeds=(0,))


def test_flops_at_equal_quality_lie_between_the_members_of_a_family():
    family = [(4e12, 1.8), (1e12, 2.0)]
    assert equal_quality_flops(family, 1.9) == pytest.approx(2e12)
    assert equal_quality_flops(family, 2.0) == pytest.approx(1e12)
    assert equal_quality_flops(family, 1.7) is None
    assert equal_quality_flops(family, 2.1) is None


def test_measurements_of_a_comparison_are_kept_until_its_result_is_written(tmp_path):
    found = compare(VARIANTS, Trainer(tmp_path), out=tmp_path, seeds=(0, 1))

    def cells(measure):
        with found.measuring(tmp_path, "cuts", {"efftrain": "1"}) as stores:
            return [store.cell("slow", lambda seed=seed: measure(seed)) for seed, store in stores.items()]

    with pytest.raises(ZeroDivisionError):
        cells(lambda seed: 5 // (1 - seed))
    assert [path.name for path in tmp_path.glob(".cuts*")] == [".cuts-seed0.json.incomplete"]
    assert cells(lambda seed: "again") == [5, "again"]
    assert not list(tmp_path.glob(".cuts*"))
    assert cells(lambda seed: "anew") == ["anew", "anew"]
