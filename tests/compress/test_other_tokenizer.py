"""A model meets text of another tokenizer of the same size: refused wherever it could, before anything is written.

Trained on it, or judged by it, it would read meaningless ids.
"""

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flax import nnx
from tiny_models import PLAIN, build, config
from tiny_runs import LENGTH, VOCABULARY, write_corpus, write_run

from efftrain import cli, data
from efftrain.compress.commands.prune import Prune
from efftrain.compress.commands.quantize import Quantize
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.structured_prune import StructuredPrune
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.distillation.build_teacher_cache import CacheOptions, build_cache
from efftrain.compress.distillation.student_run import StudentRun, student_program, train_student
from efftrain.compress.in_memory import convert_run, prune_run
from efftrain.compress.run import compress
from efftrain.compress.task.task_run import general_ids
from efftrain.data.tasks.task import Example, Task
from efftrain.errors import ConfigError, RunError
from efftrain.experiment.experiment import Experiment, reported, train_and_score
from efftrain.measure.depth.calibrate_depth import DepthCalibration, calibrate
from efftrain.measure.quality.document_scores import score_documents
from efftrain.measure.scorecard.scorecard import Figure, Scorecard
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.number_formats import Integer
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.run.tokenizers import check_tokenizer
from efftrain.train.start import check_start

HALF = Prune(sparsity="0.5")
CALIBRATION = DepthCalibration(rows=6, risk=0.9, error=0.5)
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
    train_and_score(experiment, *plain_program(), initial=initial, source=source)


def ways_to_join(run: Path, other: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Everything in the package that takes a run and text of a corpus; a key with "efftrain" is a command."""
    card = Scorecard("run", {"bpb": Figure(1.0, "bits/byte", "measured", split="train")}, {})
    text, int8 = CorpusRows(other, LENGTH), Quantization(rules=(QuantizationRule(weights=Integer(bits=8)),))
    student = StudentRun(model=MODEL, training=TRAINING, corpus=other, out=out, teacher=run, initial="layers")
    return {
        "resume_from": lambda: train(out, other, resume_from=f"{run}@40"),
        "finetune": lambda: train(out, other, finetune=run),
        "initial": lambda: train(out, other, source=run),
        "efftrain compress quantize": lambda: compress(run, Quantize(weights="int8"), out=out, corpus=other),
        "efftrain compress prune": lambda: compress(run, HALF, out=out, corpus=other),
        "efftrain compress structured": lambda: compress(run, RECOVERED, out=out, corpus=other),
        "efftrain teacher": lambda: build_cache(run, CacheOptions(rows=2), out=out, corpus=other),
        "efftrain calibrate-depth": lambda: calibrate(run, CALIBRATION, corpus=other),
        "convert in memory": lambda: convert_run(run, text, int8, "gptq"),
        "prune in memory": lambda: prune_run(run, text, HALF.structure, "magnitude"),
        "distill": lambda: student_program(student, untrained=MODEL),
        "student of its layers": lambda: train_student(replace(student, distill=None), *plain_program()),
        "report": lambda: reported(card, run, other, TRAINING),
        "score documents": lambda: score_documents(run, data.open(other), "train", out),
        "task": lambda: general_ids(run, task(), other / "tokenizer.json"),
    }


def plain_program() -> tuple[Callable[[nnx.Rngs], Decoder], Objective]:
    return lambda rngs: Decoder(MODEL, rngs=rngs), next_token_loss


def test_every_command_refuses_it(run, corpus, other, tmp_path):
    differ = rf"the tokenizers of \S+ and of the run {run} differ: entry \d+ is '.+' in one and '.+' in the other"
    ways = ways_to_join(run, other.path, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    for way in ways.values():
        with pytest.raises(ConfigError, match=differ):
            way()
        assert sorted(tmp_path.rglob("*")) == before
    check_tokenizer(run, corpus.path)
    general_ids(run, task(), corpus.path / "tokenizer.json")


def test_every_verb_with_a_run_and_a_corpus_is_among_them(tmp_path):
    """A new verb that joins the two must be added above."""
    found = set()
    for file in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                names = {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
                found |= {node.name.replace("_", "-")} if {"run", "corpus"} <= names else set()
    covered = {name.split()[-1] for name in ways_to_join(tmp_path, tmp_path, tmp_path) if name.startswith("efftrain")}
    assert found == covered


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
