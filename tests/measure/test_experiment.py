"""What recipes share: a run is refused before its first step, or ends with a model, whatever splits its corpus has."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from flax import nnx
from lock_holder import Holder

import efftrain
from efftrain import data
from efftrain.compress.commands.prune import Prune
from efftrain.compress.run import compress
from efftrain.config import to_json
from efftrain.data.splits import SplitByGroup
from efftrain.errors import ConfigError, InUseError, RunError
from efftrain.experiment import experiment as experiment_module
from efftrain.experiment.compare import compare
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.lock import beside
from efftrain.measure.scorecard.score import quality_figures
from efftrain.measure.scorecard.scorecard import Scorecard
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.train.config import Training
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.objectives.objective import next_token_loss

MODEL = llama(vocab_size=280, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_length=64)


@pytest.fixture(scope="module")
def build_corpus(tmp_path_factory):
    texts = tmp_path_factory.mktemp("texts")
    for number in range(24):
        (texts / f"{number}.txt").write_text(" ".join(f"word{number * i % 17}" for i in range(30)))

    def build(**split: float) -> Path:
        out = tmp_path_factory.mktemp("corpora") / "corpus"
        source, by = data.TextFolder(path=texts), SplitByGroup(**split)
        data.build(data.CorpusConfig(sources=(source,), rules=(), vocabulary=280, split=by, decontaminate=None), out)
        return out

    return build


@pytest.fixture(scope="module")
def only_train(build_corpus) -> Path:
    return build_corpus(validation=0, test=0)


def experiment(corpus: Path, out: Path) -> Experiment:
    training = Training(steps=3, batch_size=8, length=16, eval_every=2)
    return Experiment(model=MODEL, training=training, corpus=corpus, out=out)


def leave_run(config: Experiment) -> None:
    """What a compression reads first of a run."""
    config.out.mkdir()
    settings = {"model": to_json(config.model), "training": to_json(config.training), "corpus": str(config.corpus)}
    (config.out / "config.json").write_text(json.dumps(settings))


def train(config: Experiment):
    return train_and_score(config, lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss)[1]


def test_without_a_validation_split_the_model_is_trained_and_its_quality_not_measured(
    only_train, tmp_path, capfd, monkeypatch
):
    def quality_alone(model, *, quality, **_):  # latencies take long to compile
        return Scorecard("run", quality_figures(quality, "validation"), {})

    monkeypatch.setattr(experiment_module, "score", quality_alone)
    card = train(experiment(only_train, tmp_path / "run"))
    said = capfd.readouterr().err
    assert "has no split 'validation': the model is trained, but its quality is not measured" in said
    assert said.index("export: LlamaForCausalLM\n") < said.index("has no split")  # before anything that takes time
    assert card.figures["bpb"].value is None
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert read_metrics(tmp_path / "run", "validation") == []
    assert nnx.state(efftrain.load(tmp_path / "run"))
    train(experiment(only_train, tmp_path / "run"))
    assert "export:" not in capfd.readouterr().err  # it was said when the run began


def test_a_validation_split_that_is_shorter_than_a_row_is_refused_before_the_first_step(build_corpus, tmp_path):
    corpus = build_corpus(validation=0.1, test=0)
    n_tokens = data.open(corpus).n_tokens("validation")
    config = experiment(corpus, tmp_path / "run")
    config = replace(
        config,
        model=MODEL.replace(max_length=2 * n_tokens),
        training=replace(config.training, length=n_tokens),  # a row needs one token more
    )
    with pytest.raises(ConfigError, match=rf"split 'validation' of \S+ has {n_tokens}; use a shorter length"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_needs_the_validation_split_says_so_before_the_work(only_train, tmp_path):
    config = experiment(only_train, tmp_path / "run")
    with pytest.raises(ConfigError, match="has no split 'validation'"):
        compare({"only": config}, lambda config: pytest.fail("trained"), out=tmp_path, seeds=(0,))
    leave_run(config)
    with pytest.raises(ConfigError, match="has no split 'validation'"):
        compress(tmp_path / "run", Prune(sparsity="0.5", method="magnitude"))


def test_two_processes_do_not_make_one_compressed_run(build_corpus, tmp_path):
    leave_run(experiment(build_corpus(validation=0.3, test=0), tmp_path / "run"))
    out, options = tmp_path / "small", Prune(sparsity="0.5", method="magnitude")
    holder = Holder(beside(out), out)
    with pytest.raises(InUseError, match=rf"small is in use by process {holder.pid} on \S+; wait for it or choose"):
        compress(tmp_path / "run", options, out=out)
    assert not out.with_name("small.stages").exists()
    holder.kill()
    with pytest.raises(RunError, match="holds no checkpoint"):  # further than before
        compress(tmp_path / "run", options, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
