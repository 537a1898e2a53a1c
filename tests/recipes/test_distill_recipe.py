"""Distillation as a user has it: teacher, cache and student, then what is refused."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import compress, logits, run, run_alone, start

import efftrain
from efftrain import data
from efftrain.train.metrics.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 12
SMALL = f"""
    --training.steps {STEPS} --training.batch-size 4 --training.length 16 --training.checkpoint-every 4
    --teacher-training.steps 30 --teacher-training.batch-size 4 --teacher-training.length 16 --rows 48
""".split()
FIGURES = {"d-model": (16, 32), "n-repeats": (2, 2), "max-length": (32, 32), "vocab-size": (300, 300)}
ATTENTION = {"n-heads": (2, 4), "n-kv-heads": (2, 4), "d-head": (8, 8)}


def sizes() -> list[str]:
    found = []
    for i, model in enumerate(("model", "teacher-model")):
        found += [a for name, both in FIGURES.items() for a in (f"--{model}.{name}", str(both[i]))]
        found += [a for n, both in ATTENTION.items() for a in (f"--{model}.pattern.0.attention.{n}", str(both[i]))]
        found += [f"--{model}.pattern.0.mlp.d-ff", str((32, 64)[i])]
    return found


@pytest.fixture(scope="module")
def command(corpus):
    def make(out: Path, *changes: str | Path) -> list[str]:
        script = str(ROOT / "recipes" / "distill.py")
        fixed = [sys.executable, script, "cpu", "--corpus", str(corpus), "--out", str(out), *SMALL, *sizes()]
        return [*fixed, *map(str, changes)]

    return make


def keep(*arguments: str | Path) -> tuple[int, str]:
    return run([sys.executable, "-m", "efftrain.cli", "teacher", *map(str, arguments)])


@pytest.fixture(scope="module")
def student(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    code, output = run_alone(command(out))
    assert code == 0, output
    assert all(name in output for name in ("teacher", "student-text", "student"))
    return out


@pytest.fixture(scope="module")
def cache(student) -> Path:
    out = student.with_name("kept")
    code, output = keep(student.with_name("teacher"), "--top-k", "64", "--rows", "48", "--out", out)
    assert code == 0, output
    assert "bytes per token" in output
    return out


def test_a_teacher_and_its_student(student, corpus):
    teacher = efftrain.load(student.with_name("teacher"))
    model = efftrain.load(student)
    assert (teacher.config.d_model, model.config.d_model) == (32, 16)
    rows = read_metrics(student)
    assert len(rows) == STEPS
    assert rows[-1]["loss/teacher"] < rows[0]["loss/teacher"]
    figures = json.loads((student / "scorecard.json").read_text())["figures"]
    assert "in the objective, outside the model" in figures["train_flops_per_token"]["note"]
    assert (student / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()


def test_what_is_kept_of_it_teaches_the_same_batches(command, student, cache):
    out = student.with_name("from-cache")
    code, output = run(command(out, "--cache", cache))
    assert code == 0, output
    online, kept = read_metrics(student), read_metrics(out)
    np.testing.assert_allclose(kept[0]["loss"], online[0]["loss"], rtol=1e-5)  # the same rows, the same start
    np.testing.assert_allclose(kept[0]["loss/teacher"], online[0]["loss/teacher"], rtol=0.15)  # from below
    assert kept[0]["loss/teacher"] <= online[0]["loss/teacher"] + 1e-3
    np.testing.assert_allclose(kept[-1]["loss"], online[-1]["loss"], rtol=0.02)


def test_a_student_that_was_stopped_goes_on_as_if_it_was_not(command, student):
    """Same ramps, same batches, same teacher: killed behind a checkpoint, to the bit."""
    out = student.with_name("stopped")
    arguments = ["--distill.alpha.end", "0.5", "--distill.temperature.start", "2", "--distill.temperature.end", "1"]
    teacher = ["--teacher", student.with_name("teacher"), *arguments]
    process = start(command(out, *teacher, "--training.steps", "150"))
    while not list(out.glob("checkpoints/[0-9]*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not (out / "scorecard.json").exists()
    whole = student.with_name("whole")
    for where in (out, whole):
        code, output = run(command(where, *teacher, "--training.steps", "150"))
        assert code == 0, output
    stopped, straight = ([r["loss/teacher"] for r in read_metrics(where)] for where in (out, whole))
    assert stopped == straight


def test_what_is_cut_learns_from_what_it_was(student):
    """The run teaches what is left of it, in every round; the same command again does nothing."""
    teacher, out = student.with_name("teacher"), student.with_name("cut")
    flags = "--ratio 0.3 --recovery-tokens 512 --rounds 2 --distill --rows 16"
    arguments = ["structured", teacher, *flags.split()]
    code, output = compress(*arguments, "--out", out)
    assert code == 0, output
    assert read_metrics(out)[-1]["loss/teacher"] > 0
    for run_ in (out, out.with_name("cut.stages") / "1-recovered"):
        assert Path(json.loads((run_ / "config.json").read_text())["teacher"]) == teacher
    stamp = (out / "scorecard.json").stat().st_mtime_ns
    cut = out.with_name("cut.stages") / "1-cut" / "compression.json"
    before = json.loads(cut.read_text())
    del before["options"]["search"]  # as written before there was such an option
    cut.write_text(json.dumps(before))
    code, output = compress(*arguments, "--out", out)
    assert code == 0, output
    assert "is converted already" in output
    assert (out / "scorecard.json").stat().st_mtime_ns >= stamp


def test_students_begin_with_parts_of_their_teacher(command, student):
    """With as much of it as there is, they are their teacher."""
    teacher = student.with_name("teacher")
    same = [a for n, both in FIGURES.items() for a in (f"--model.{n}", str(both[1]))]
    same += [a for n, both in ATTENTION.items() for a in (f"--model.pattern.0.attention.{n}", str(both[1]))]
    same += ["--model.pattern.0.mlp.d-ff", "64"]
    for initial in ("layers", "cut"):
        out = student.with_name(f"from-{initial}")
        changes = ["--initial", initial, "--teacher", teacher, "--training.optimizer.peak-lr", "1e-9", *same]
        code, output = run(command(out, *changes))
        assert code == 0, output
        np.testing.assert_allclose(logits(efftrain.load(out)), logits(efftrain.load(teacher)), rtol=1e-3, atol=1e-3)
        assert read_metrics(out)[0]["loss/teacher"] == pytest.approx(0, abs=1e-4)


def test_bad_input_is_one_sentence(command, student, cache, tmp_path):
    out = student.with_name("refused")

    def refused(*changes) -> str:
        code, output = run(command(out, *changes))
        assert code == 2, output
        assert not (out / "checkpoints").exists()
        return " ".join(output.split())

    assert "model.vocab_size is 320 and the teacher's is 300" in refused("--model.vocab-size", "320")
    other = tmp_path / "other-teacher"
    shutil.copytree(student.with_name("teacher"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    entries = tokenizer["model"]["vocab"]
    names = {number: token for token, number in entries.items()}
    entries[names[290]], entries[names[291]] = 291, 290
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"entry 290 is {names[290]!r} in one and {names[291]!r}" in refused("--teacher", other)
    assert "distill.beta needs the teacher itself" in refused("--cache", cache, "--distill.beta", "0.5")
    assert "was made by another teacher" in refused("--cache", cache, "--teacher", student)
    assert "has 48 rows" in refused("--cache", cache, "--rows", "49")


def test_a_cache_of_other_text_is_refused(command, student, cache, tmp_path):
    texts = tmp_path / "texts" / "package"
    texts.mkdir(parents=True)
    for i in range(12):
        (texts / f"{i}.py").write_text("\n".join(f"value {i} {j} in range" for j in range(40)))
    source = data.TextFolder(path=tmp_path / "texts", pattern="*.py")
    tokenizer = student / "tokenizer.json"
    data.build(data.CorpusConfig(sources=(source,), rules=(), vocabulary=300, tokenizer=tokenizer), tmp_path / "c")
    code, output = run([*command(student.with_name("elsewhere"), "--cache", cache), "--corpus", str(tmp_path / "c")])
    assert code == 2
    assert "another corpus" in " ".join(output.split())
