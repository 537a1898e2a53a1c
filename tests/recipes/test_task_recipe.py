"""Distillation for a task as a user has it: made-up tasks, a general model, a kill, bad input."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import run, run_alone, start

import efftrain
from efftrain.compress.task.task import predict
from efftrain.compress.task.task_run import task_loss
from efftrain.data.tasks.items import TaskIds, questions
from efftrain.data.tasks.task import read_examples, same_text
from efftrain.measure.cost.parameters import count_parameters
from efftrain.models.decoder import abstract_decoder
from efftrain.recipe import import_script
from efftrain.train.metrics.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "recipes" / "task_distill.py")


def small(learner: str, d_model: int, steps: int) -> list[str]:
    model = f"--{learner}.model"
    return f"""
        {model}.d-model {d_model} {model}.n-repeats 2 {model}.max-length 128
        {model}.pattern.0.attention.n-heads 2 {model}.pattern.0.attention.n-kv-heads 2
        {model}.pattern.0.attention.d-head {d_model // 2} {model}.pattern.0.mlp.d-ff {2 * d_model}
        --{learner}.vocabulary 300 --{learner}.training.steps {steps} --{learner}.training.batch-size 8
        --{learner}.training.length 128 --{learner}.training.checkpoint-every 5
    """.split()


SMALL = [*small("teacher", 32, 40), *small("student", 16, 20), "--teacher.text-weight", "0.02"]


def command(name: str, out: Path, *changes: str | Path) -> list[str]:
    return [sys.executable, SCRIPT, name, "--out", str(out), *SMALL, *map(str, changes)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Killed while its teacher is trained, and continued."""
    out = tmp_path_factory.mktemp("runs") / "shop"
    whole = command("cpu", out, "--augment.per-label", "8", "--augment.threshold", "0.1")
    process = start(whole)
    while process.poll() is None and not (out / "teacher-seed0" / "checkpoints" / "10").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, output = run_alone(whole)
    assert code == 0, output
    assert "continuing from step" in output or "is trained already" in output
    return out


def test_a_student_is_a_model_that_loads_and_answers_as_its_figures_say(shop):
    found = json.loads((shop / "task.json").read_text())
    assert set(found["models"]) == {"teacher", "student", "plain student", "student, 8 bits"}
    test = read_examples(shop / "examples" / "test.csv", "text", "label")
    for name, folder in {
        "teacher": "teacher-seed0",
        "student": "student-seed0",
        "plain student": "plain-seed0",
    }.items():
        model, ids = efftrain.load(shop / folder), TaskIds.read(shop / folder)
        logits = predict(model, task_loss(ids), questions(ids, [e.text for e in test]), length=128)
        right = np.mean([ids.labels[i] == e.answer for i, e in zip(logits.argmax(-1), test, strict=True)])
        figures = found["models"][name]
        assert figures["accuracy"]["values"] == [pytest.approx(right, abs=0.01)]
        assert figures["parameters"]["mean"] == count_parameters(model).total
        assert figures["bytes"]["mean"] == 4 * count_parameters(model).total
        assert figures["latency_s"]["mean"] > 0
        assert model.config.vocab_size == ids.size
    assert found["models"]["teacher"]["accuracy"]["mean"] > 3 / 12  # far from chance, which is 1 / 12
    student, plain = (found["models"][name] for name in ("student", "plain student"))
    stored = found["models"]["student, 8 bits"]
    assert stored["bytes"]["mean"] < 0.35 * student["bytes"]["mean"]
    assert abs(stored["accuracy"]["mean"] - student["accuracy"]["mean"]) < 0.05
    assert student["train_flops"] == plain["train_flops"]
    assert student["flops"]["mean"] < found["models"]["teacher"]["flops"]["mean"] / 2
    assert [row["step"] for row in read_metrics(shop / "teacher-seed0")] == list(range(1, 41))
    assert {"loss/divergence", "loss/label", "loss/text"} <= read_metrics(shop / "student-seed0")[-1].keys()
    assert "loss/divergence" not in read_metrics(shop / "plain-seed0")[-1]


def test_what_the_teacher_said_is_kept_and_holds_no_test_text(shop):
    with np.load(shop / "teacher-seed0" / "taught.npz") as file:
        said, logits, labels = json.loads(str(file["said"])), file["logits"], file["labels"]
    made_up = said["counts"]["made up"]
    n = said["counts"]["labelled"] + said["counts"]["unlabelled"]
    assert len(said["texts"]) == len(logits) == len(labels) == n + made_up["kept"]
    assert made_up["drawn"] == 8 * 12
    assert (labels[: said["counts"]["labelled"]] >= 0).all()
    assert (labels[said["counts"]["labelled"] :] == -1).all()
    test = {same_text(e.text) for e in read_examples(shop / "examples" / "test.csv", "text", "label")}
    texts = [same_text(text) for text in said["texts"]]
    assert not test & set(texts)
    assert len(set(texts)) == len(texts)


def test_the_same_command_trains_nothing_again_and_another_one_is_refused(shop):
    before = json.loads((shop / "task.json").read_text())["models"]
    again = command("cpu", shop, "--augment.per-label", "8", "--augment.threshold", "0.1")
    code, output = run(again)
    assert code == 0, output
    assert output.count("is trained already") == 3
    assert "drawing" not in output
    after = json.loads((shop / "task.json").read_text())["models"]
    assert all(after[name]["accuracy"] == before[name]["accuracy"] for name in before)
    code, output = run([*again, "--alpha", "0.5"])
    assert code == 2
    assert "student-seed0 holds a run with another configuration" in " ".join(output.split())


def test_a_task_that_generates(tmp_path):
    changes = ("--augment.samples", "2", "--augment.threshold", "0.5", "--teacher.training.steps", "5",
               "--student.training.steps", "5")  # fmt: skip
    code, output = run(command("amounts", tmp_path / "amounts", *changes))
    assert code == 0, output
    found = json.loads((tmp_path / "amounts" / "task.json").read_text())
    assert all(0 <= figures["exact_match"]["mean"] <= 1 for figures in found["models"].values())
    assert "accuracy" not in found["models"]["student"]
    assert found["taught"]["0"]["answers"]["asked"] == 300


def test_a_comparison_has_seeds_and_the_general_model(corpus, tmp_path):
    dense, general = str(ROOT / "recipes" / "dense.py"), tmp_path / "general"
    model = """
        --model.vocab-size 300 --model.d-model 32 --model.n-repeats 1 --model.max-length 256
        --model.pattern.0.attention.n-heads 2 --model.pattern.0.attention.n-kv-heads 2
        --model.pattern.0.attention.d-head 16 --model.pattern.0.mlp.d-ff 64
        --training.steps 5 --training.batch-size 4 --training.length 32
    """
    code, output = run([sys.executable, dense, "cpu", "--corpus", str(corpus), "--out", str(general), *model.split()])
    assert code == 0, output
    changes = ("--general", general, "--compare", "--seeds", "0", "1", "--no-augmented",
               "--teacher.training.steps", "10", "--student.training.steps", "5")  # fmt: skip
    code, output = run(command("cpu", tmp_path / "out", *changes))
    assert code == 0, output
    found = json.loads((tmp_path / "out" / "task.json").read_text())
    names = {"teacher", "student", "plain student", "student, 8 bits", "general, probe", "general, few-shot"}
    assert set(found["models"]) == names
    assert all(len(figures["accuracy"]["values"]) == 2 for figures in found["models"].values())
    probe = found["models"]["general, probe"]["accuracy"]
    assert probe["sd"] == 0
    assert probe["mean"] > 2 / 12
    assert found["models"]["general, few-shot"]["texts"]["mean"] == 300
    teacher = efftrain.load(tmp_path / "out" / "teacher-seed0")
    assert (teacher.config.d_model, teacher.config.n_layers) == (32, 1)
    assert "made up" not in found["taught"]["0"]


def test_bad_input_is_one_sentence(tmp_path):
    (tmp_path / "train.csv").write_text('text,label\na,x\n"b,y\nc,x\n')
    (tmp_path / "good.csv").write_text("text,label\n" + "".join(f"{w} {i},{w}\n" for w in "xy" for i in range(9)))
    (tmp_path / "test.csv").write_text("text,label\na,x\nb,zebra\n")
    cases = {
        ("--labelled", tmp_path / "train.csv"): "needs both --labelled and --test",
        ("--unlabelled", tmp_path / "good.csv"): "--unlabelled belongs to a task of your own",
        ("--labelled", tmp_path / "train.csv", "--test", tmp_path / "test.csv"): "begins in line 3 is not CSV",
        ("--labelled", tmp_path / "good.csv", "--test", tmp_path / "test.csv"): "line 3: label 'zebra' has no labelled",
        ("--labelled", tmp_path / "good.csv", "--test", tmp_path / "good.csv", "--text", "q"): "there is no column 'q'",
        ("--general", tmp_path): "holds no config.json",
        ("--alpha", "2"): "alpha is 2.0",
        ("--student.training.length", "8"): "but a row has 8; set training.length to",
    }
    for arguments, message in cases.items():
        if arguments[0] in ("--alpha", "--student.training.length"):
            arguments = (*arguments, "--teacher.training.steps", "1", "--no-augmented")
        code, output = run(command("cpu", tmp_path / "out", *arguments))
        assert (code, "Traceback" in output) == (2, False), output
        assert message in " ".join(output.split()), output


def test_configurations_have_the_sizes_that_are_said():
    recipe = import_script(Path(SCRIPT))
    assert list(recipe.configs) == ["cpu", "amounts", "banking77", "gpu"]
    for name, config in recipe.configs.items():
        teacher, student = (
            count_parameters(abstract_decoder(learner.model)).total for learner in (config.teacher, config.student)
        )
        assert student <= teacher / 10, name
