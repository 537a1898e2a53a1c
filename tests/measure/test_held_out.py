"""Which rows choose and which report: of a corpus whose test split has other text than its validation split."""

import json
import math
import random
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import PLAIN, build, config
from tiny_runs import LENGTH, VOCABULARY, write_run

import efftrain
from efftrain import data
from efftrain.compress.commands.quantize import Quantize
from efftrain.compress.run import compress
from efftrain.data.splits import SplitByGroup
from efftrain.errors import CorpusError
from efftrain.experiment.compare import Comparison
from efftrain.experiment.experiment import reported
from efftrain.measure.measurements import Measurements
from efftrain.measure.quality.evaluate import Evaluator
from efftrain.measure.quality.held_out import choosing, reporting
from efftrain.measure.scorecard.score import quality_figures
from efftrain.measure.scorecard.scorecard import Scorecard, table
from efftrain.models.decoder import Decoder
from efftrain.train.config import Training

MODEL = config(vocab_size=VOCABULARY, pattern=(PLAIN,), n_repeats=2, max_length=32)
TRAINING = Training(steps=40, batch_size=8, length=LENGTH)


def planted(folder: Path, *, test: float = 0.25) -> data.Corpus:
    """48 texts of the same size; those of the test split have digits where the others have letters."""
    letters, digits = "abcdefghijklmnop", "0123456789()+-*/"

    def built(name: str, plain: set[str]) -> data.Corpus:
        for i in range(48):
            body = "".join(random.Random(i).choices(letters if str(i) in plain else digits, k=120))
            (folder / name / f"p{i:02}").mkdir(parents=True)
            (folder / name / f"p{i:02}" / "text.txt").write_text(f"{i:02} {body}")
        source = data.TextFolder(path=folder / name, group_by_folder=True)
        split = SplitByGroup(validation=0.25, test=test)
        rules = {"rules": (), "deduplicate": False, "decontaminate": None}
        made = data.CorpusConfig(sources=(source,), vocabulary=VOCABULARY, block=64, split=split, **rules)
        return data.build(made, folder / f"{name}-corpus")

    first = built("first", {str(i) for i in range(48)})
    numbers = {split: {str(int(d.text[:2])) for d in first.documents(split)} for split in first.splits}
    corpus = built("second", set().union(*(n for split, n in numbers.items() if split != "test")))
    assert {s: {str(int(d.text[:2])) for d in corpus.documents(s)} for s in corpus.splits} == numbers
    return corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> data.Corpus:
    return planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def without_test(tmp_path_factory) -> data.Corpus:
    return planted(tmp_path_factory.mktemp("no-test"), test=0)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", build(MODEL), corpus, TRAINING)


def by_hand(corpus: data.Corpus, model: Decoder, split: str) -> float:
    part = (data.Part(path=corpus.path),)
    loader = data.LoaderConfig(corpora=part, length=LENGTH, batch_size=8, split=split, shuffle=False, repeat=False)
    return Evaluator(lambda: data.batches(loader), corpus.token_bytes(split))(model)["bpb"]


def rows_of(held_out, batch_size: int) -> list[bytes]:
    """Without those that fill up the last batch."""
    return [
        tokens.tobytes() + segments.tobytes()
        for batch in held_out.batches(batch_size)
        for tokens, segments, mask in zip(batch["tokens"], batch["segments"], batch["mask"], strict=True)
        if mask.any()
    ]


@pytest.mark.parametrize("batch_size", [8, 3])
@pytest.mark.parametrize("chosen", [1, 8, 10])
def test_no_row_chooses_and_reports(without_test, chosen, batch_size):
    """Of the one split there is: what is not read to choose is read to report, and no row is both."""
    arguments = without_test.path, LENGTH
    chosen_on = rows_of(choosing(*arguments, chosen), batch_size)
    held_out = reporting(*arguments, chosen=chosen, batch_size=batch_size)
    reported_on = rows_of(held_out, batch_size)
    whole = rows_of(choosing(*arguments), batch_size)
    assert len(chosen_on) >= chosen
    assert len(set(whole)) == len(whole) == len(chosen_on) + len(reported_on)
    assert chosen_on + reported_on == whole
    assert held_out.split == "validation"
    assert held_out.note.startswith(f"the corpus has no test split; without the first {len(chosen_on)} rows")
    with pytest.raises(CorpusError, match=r"has no test split .* rows of its validation split would be used to choose"):
        reporting(*arguments, chosen=len(whole), batch_size=batch_size)
    assert rows_of(reporting(*arguments), batch_size) == whole  # nothing was chosen


def test_a_test_split_reports_whatever_was_chosen(corpus):
    held_out = reporting(corpus.path, LENGTH, 5, chosen=10_000)
    assert (held_out.split, held_out.note) == ("test", "5 rows")
    assert len(rows_of(held_out, 8)) == 8  # batches are read whole
    assert not set(rows_of(reporting(corpus.path, LENGTH), 8)) & set(rows_of(choosing(corpus.path, LENGTH), 8))


@pytest.fixture(scope="module")
def compressed(run) -> tuple[Path, Scorecard]:
    """With a choice, of formats, on 8 rows."""
    options = Quantize(weights="int8,int4:g4", budget=0.27, rows=8)
    return run.with_name("mixed"), compress(run, options, out=run.with_name("mixed"))


def test_a_compression_chooses_on_validation_and_reports_on_test(compressed, corpus, capsys):
    out, card = compressed
    model = efftrain.load(out)
    assert card.value("bpb") == pytest.approx(by_hand(corpus, model, "test"), rel=1e-5)
    assert card.value("bpb") != pytest.approx(by_hand(corpus, model, "validation"), rel=1e-2)
    written = json.loads((out / "scorecard.json").read_text())["figures"]
    splits = {name: written[name]["split"] for name in ("bpb", "loss", "parameters_total")}
    assert splits == {"bpb": "test", "loss": "test", "parameters_total": ""}
    choice = json.loads((out / "compression.json").read_text())["choice"]
    assert (choice["split"], choice["rows"]) == ("validation", 8)
    Console(width=200).print(table([card]))
    assert "test split" in capsys.readouterr().out


def test_a_run_is_reported_on_test_once(run, corpus):
    """The card of training, which has the validation split's figures, gets those of the test split and keeps them."""
    model = efftrain.load(run)
    trained = Scorecard(
        "run", quality_figures({"bpb": by_hand(corpus, model, "validation"), "loss": 1.0}, "validation"), {}
    )
    card = reported(trained, run, corpus.path, TRAINING)
    assert card.value("bpb") == pytest.approx(by_hand(corpus, model, "test"), rel=1e-5)
    assert (trained.figures["bpb"].split, card.figures["bpb"].split) == ("validation", "test")
    assert Scorecard.read(run / "scorecard.json") == card
    stamp = (run / "scorecard.json").stat().st_mtime_ns
    assert reported(card, run, corpus.path, TRAINING) == card
    assert (run / "scorecard.json").stat().st_mtime_ns == stamp
    found = Comparison((0,), {"run": [card]}, {"run": {}}).as_json()
    assert found["variants"]["run"]["bpb"]["split"] == "test"


def test_models_are_measured_one_after_the_other_and_not_again(tmp_path):
    corpus, model = planted(tmp_path), build(MODEL)
    rows, built = reporting(corpus.path, LENGTH, 16), []

    def make(name):
        built.append(name)
        return model

    path = tmp_path / "result.json"
    with Measurements(path, {}, {"efftrain": "1"}) as store:
        first = rows.bits_per_byte({"one": lambda: make("one")}, store)
    with Measurements(path, {}, {"efftrain": "1"}) as store:
        found = rows.bits_per_byte({name: lambda name=name: make(name) for name in ("one", "two")}, store)
    assert built == ["one", "two"]
    assert found["one"] == found["two"] == first["one"] == pytest.approx(rows.evaluator()(model)["bpb"])


def test_a_model_without_a_finite_loss_has_no_number(tmp_path, monkeypatch):
    corpus = planted(tmp_path)
    monkeypatch.setattr(Evaluator, "__call__", lambda self, model: {"bpb": math.inf})
    with Measurements(tmp_path / "result.json", {}, {"efftrain": "1"}) as store:
        found = reporting(corpus.path, LENGTH, 8).bits_per_byte({"one": lambda: None}, store)
    assert math.isnan(found["one"])
