"""What was compressed of another model, of other text, with other options or by other code is not taken as done."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny_models import PLAIN, build, config
from tiny_runs import LENGTH, OWN_BLOCK, VOCABULARY, with_own_block, write_corpus, write_run

import efftrain
from efftrain import code_identity
from efftrain.compress.commands.prune import Prune
from efftrain.compress.commands.quantize import Quantize
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.structured_prune import StructuredPrune
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.origin import rounds_are_done
from efftrain.compress.rounds import in_best_shape
from efftrain.compress.run import compress
from efftrain.errors import ConfigError, RunError
from efftrain.train.config import Training

MODEL = config(vocab_size=VOCABULARY, pattern=(PLAIN,), n_repeats=1, max_length=32)
TRAINING = Training(steps=40, batch_size=8, length=LENGTH)
INT8 = Quantize(weights="int8")
RECOVERY = RecoveryTraining(tokens=2 * 8 * LENGTH)
PRUNED = Prune(sparsity="0.5", method="magnitude", rows=2, recovery=RECOVERY)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture
def run(corpus, tmp_path):
    return with_own_block(write_run(tmp_path / "run", build(MODEL), corpus, TRAINING))


@pytest.fixture
def edited(monkeypatch):
    """The package, from here on."""
    return lambda: monkeypatch.setattr(code_identity, "package_identity", lambda rooms: "another version")


def test_a_conversion_is_of_one_model_and_one_code(run, corpus, tmp_path, edited):
    out = tmp_path / "out"

    def convert(evaluated_rows: int = 2):
        return compress(run, INT8, out=out, evaluated_rows=evaluated_rows)

    card = convert()
    assert convert() == card
    with pytest.raises(RunError, match=r"was made with other options or inputs \(evaluated_rows: 2 -> 4\)"):
        convert(4)
    (run / "recipe.py").write_text(OWN_BLOCK.replace("1.0", "2.0"))
    with pytest.raises(RunError, match=r"\(model: .* choose another --out, or delete it"):
        convert()
    (run / "recipe.py").write_text(OWN_BLOCK)
    assert convert() == card
    shutil.rmtree(run)  # trained anew, to the same step
    with_own_block(write_run(run, build(MODEL, seed=1), corpus, TRAINING))
    with pytest.raises(RunError, match=r"\(model: .* choose another --out, or delete it"):
        convert()
    shutil.rmtree(run)
    with_own_block(write_run(run, build(MODEL), corpus, TRAINING))
    assert convert() == card
    edited()
    with pytest.raises(RunError, match=r"was made with other code \(changed since: efftrain\); choose another --out"):
        convert()


def test_rounds_of_other_code_begin_again_until_they_are_done(run, corpus, tmp_path, edited, capfd):
    out, stages = tmp_path / "out", tmp_path / "out.stages"

    def done(options: Prune = PRUNED) -> bool:
        return rounds_are_done(run, options, CorpusRows(corpus.path, LENGTH), out, stages, None)

    def stopped_in_the_last_round() -> None:
        for folder in (stages / "1-cut", out):
            folder.mkdir()

    assert not done()
    stopped_in_the_last_round()
    assert not done()
    assert (stages / "1-cut").exists()
    edited()
    assert not done()
    assert "other code (changed since: efftrain); starting again" in " ".join(capfd.readouterr().err.split())
    assert not out.exists()
    assert [path.name for path in stages.iterdir()] == ["compression.json"]
    stopped_in_the_last_round()
    more = replace(PRUNED, recovery=RecoveryTraining(tokens=10_000))
    assert not done(more)  # its stages are compared one by one, and nothing is deleted
    assert out.exists()
    (out / "scorecard.json").write_text("{}")
    assert done()
    (run / "recipe.py").write_text(OWN_BLOCK.replace("1.0", "2.0"))
    assert not done()
    (run / "recipe.py").write_text(OWN_BLOCK)


def test_finished_rounds_of_other_code_are_refused_and_kept(run, corpus, tmp_path, edited):
    out, stages = tmp_path / "out", tmp_path / "out.stages"
    arguments = run, PRUNED, CorpusRows(corpus.path, LENGTH), out, stages, None
    assert not rounds_are_done(*arguments)
    (stages / "1-cut").mkdir()
    out.mkdir()
    (out / "scorecard.json").write_text("{}")
    assert rounds_are_done(*arguments)
    edited()
    with pytest.raises(RunError, match=r"was made with other code \(changed since: efftrain\); choose another --out"):
        rounds_are_done(*arguments)
    assert (out / "scorecard.json").exists()
    assert (stages / "1-cut").exists()


WRITTEN_BEFORE = {  # the options of int8, as the command without subcommands wrote them
    **{"quantize": "int8", "activations": None, "cache": None, "layers": "blocks/.*", "method": None, "budget": None},
    **{"rows": 128, "sparsity": None, "slim": None, "way": "width", "by": "parameters", "search": None, "recover": 0},
    **{"rounds": 1, "distill": False},
}


def as_before(folder, written: str) -> None:
    """Gives the record of a folder the options of the earlier command, under a name that versions wrote."""
    record = json.loads((folder / "compression.json").read_text())
    (folder / "compression.json").write_text(json.dumps(record | {"options": {"type": written} | WRITTEN_BEFORE}))


@pytest.mark.parametrize("written", ["Compression", "efftrain.compress.options:Compression"])
def test_what_the_command_without_subcommands_made_loads_and_is_not_made_again(run, corpus, tmp_path, written):
    out, stages = tmp_path / "out", tmp_path / "rounds.stages"
    compress(run, INT8, out=out, evaluated_rows=2)
    as_before(out, written)
    assert efftrain.load(out).config.quantization.stored
    with pytest.raises(RunError, match=f"{out} was made with the options of an earlier version of efftrain compress; "):
        compress(run, INT8, out=out, evaluated_rows=2)
    arguments = run, PRUNED, CorpusRows(corpus.path, LENGTH), tmp_path / "rounds", stages, None
    assert not rounds_are_done(*arguments)
    (stages / "1-cut").mkdir()
    as_before(stages, written)
    before = sorted(stages.rglob("*"))
    with pytest.raises(RunError, match=r"rounds\.stages was made with the options of an earlier version .* delete it"):
        rounds_are_done(*arguments)
    assert sorted(stages.rglob("*")) == before


def test_a_search_that_was_refused_leaves_nothing_that_refuses_the_corrected_one(run, corpus, tmp_path):
    """Its shapes were listed and none was tried: another list takes the place. Where one was tried it is kept."""
    options, folder = StructuredPrune(ratio=0.3, search=9, rows=2, recovery=RECOVERY), tmp_path / "1-search"
    folder.mkdir()
    (folder / "shapes.json").write_text(json.dumps({"run": "another one", "options": None, "shapes": []}))
    text = CorpusRows(corpus.path, 999)  # no row is so long: refused before the first cut
    with pytest.raises(ConfigError, match="length 999 needs 1000 tokens"):
        in_best_shape(run, options, 1, text, folder, TRAINING, None)
    assert json.loads((folder / "shapes.json").read_text())["run"] == str(run)
    (folder / "1-cut").mkdir()
    text = CorpusRows(corpus.path, 998)
    (folder / "shapes.json").write_text(json.dumps({"run": "another one", "options": None, "shapes": []}))
    with pytest.raises(RunError, match="1-search was made with other options or inputs"):
        in_best_shape(run, options, 1, text, folder, TRAINING, None)


def test_text_that_is_too_short_is_refused_before_anything_is_made(run, tmp_path):
    settings = json.loads((run / "config.json").read_text())
    settings["training"]["length"] = 9999
    (run / "config.json").write_text(json.dumps(settings))
    before = sorted(tmp_path.rglob("*"))
    many = RecoveryTraining(tokens=10**7)
    for options in (PRUNED, StructuredPrune(ratio=0.3, search=2, rows=2, recovery=many)):
        with pytest.raises(ConfigError, match=r"length 9999 needs 10000 tokens and split 'validation' of .* has"):
            compress(run, options, out=tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before
