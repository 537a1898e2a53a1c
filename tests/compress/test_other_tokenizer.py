"""A model meets text of another tokenizer of the same size: refused wherever it could, before anything is written.

Trained on it, or judged by it, it would read meaningless ids.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import PLAIN, build, config
from tiny_runs import LENGTH, VOCABULARY, write_corpus, write_run

from efftrain.compress.commands.quantize import Quantize
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.structured_prune import StructuredPrune
from efftrain.compress.distillation.build_teacher_cache import CacheOptions, build_cache
from efftrain.compress.run import compress
from efftrain.compress.task.task_run import general_ids
from efftrain.data.tasks.task import Example, Task
from efftrain.errors import ConfigError, RunError
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.depth.calibrate_depth import DepthCalibration, calibrate
from efftrain.models.decoder import Decoder
from efftrain.train.config import Training
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.run.tokenizers import check_tokenizer
from efftrain.train.start import check_start

RECOVERED = StructuredPrune(ratio=0.3, recovery=RecoveryTraining(tokens=999))
MODEL = config(vocab_size=VOCABULARY, pattern=(PLAIN,), n_repeats=2, max_length=32)
TRAINING = Training(steps=41, batch_size=8, length=LENGTH)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("other"), words=("and", "the", "when", "while", "über"))


@pytest.fixture
def run(corpus, tmp_path) -> Path:
    run = write_run(tmp_path / "run", build(MODEL), corpus, TRAINING)
    shutil.copyfile(corpus.path / "tokenizer.json", run / "tokenizer.json")
    return run


def train(out: Path, corpus: Path, source: Path | None = None, **training) -> None:
    settings = replace(TRAINING, **training)
    experiment = Experiment(model=MODEL, training=settings, corpus=corpus, out=out)
    initial = source and (lambda: pytest.fail("the model was made before it was checked"))
    build = lambda rngs: Decoder(MODEL, rngs=rngs)  # noqa: E731
    train_and_score(experiment, build, next_token_loss, initial=initial, source=source)


def test_every_command_refuses_it(run, corpus, other, tmp_path):
    differ = rf"the tokenizers of \S+ and of the run {run} differ: entry \d+ is '.+' in one and '.+' in the other"
    out = tmp_path / "out"
    ways = {
        "resume_from": lambda: train(out, other.path, resume_from=f"{run}@40"),
        "finetune": lambda: train(out, other.path, finetune=run),
        "initial": lambda: train(out, other.path, source=run),
        "compress": lambda: compress(run, Quantize(weights="int8"), out=out, corpus=other.path),
        "recover": lambda: compress(run, RECOVERED, out=out, corpus=other.path),
        "teacher": lambda: build_cache(run, CacheOptions(rows=2), out=out, corpus=other.path),
        "calibrate": lambda: calibrate(run, DepthCalibration(rows=6, risk=0.9, error=0.5), corpus=other.path),
        "task": lambda: general_ids(run, task(), other.path / "tokenizer.json"),
    }
    before = sorted(tmp_path.rglob("*"))
    for way in ways.values():
        with pytest.raises(ConfigError, match=differ):
            way()
        assert sorted(tmp_path.rglob("*")) == before
    check_tokenizer(run, corpus.path)
    general_ids(run, task(), corpus.path / "tokenizer.json")


def task() -> Task:
    example = (Example("a", "b", 1),)
    return Task(labels=("b",), train=example, validation=example, test=example, unlabelled=(), removed={})


def test_the_same_tokenizer_in_another_file_is_the_same(run, corpus, other, tmp_path):
    written = json.loads((corpus.path / "tokenizer.json").read_text())
    (run / "tokenizer.json").write_text(json.dumps(written))  # without line breaks
    check_tokenizer(run, corpus.path)
    (tmp_path / "rebuilt").mkdir()
    rebuilt = write_corpus(tmp_path / "rebuilt", words=("and", "the"), tokenizer=run / "tokenizer.json")
    check_tokenizer(run, rebuilt.path)
    (run / "tokenizer.json").unlink()
    check_tokenizer(run, corpus.path)  # of an earlier version: the corpus that it names
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"corpus": "gone"}))
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json, .*; copy that of the corpus it was trained on"):
        check_tokenizer(run, corpus.path)


def test_a_run_that_cannot_be_started_from_is_named(run, corpus):
    def refused(**changes) -> None:
        check_start(replace(TRAINING, **changes), MODEL.replace(d_model=8, dtype="bfloat16"), corpus.path)

    with pytest.raises(RunError, match=r"training\.resume_from: nowhere holds no run"):
        refused(resume_from="nowhere@3")
    with pytest.raises(RunError, match=r"training\.finetune: nowhere holds no run"):
        refused(finetune=Path("nowhere"))
    with pytest.raises(RunError, match=r"has other parameters \(model\.d_model: 16 -> 8 and 1 more\); give this run"):
        refused(finetune=run)
    check_start(replace(TRAINING, finetune=run), MODEL.replace(dtype="bfloat16", max_length=64), corpus.path)
    with pytest.raises(ConfigError, match=r"training\.resume_from and training\.finetune are both set"):
        refused(finetune=run, resume_from=f"{run}@40")
