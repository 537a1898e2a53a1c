"""Several processes are one run: the losses of one process, one stop, one checkpoint, and nobody waits for the dead."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from several_hosts_recipe import EVAL_EVERY, STEPS

from efftrain import data
from efftrain.train.metrics.metrics_log import read_metrics

RECIPE = Path(__file__).with_name("several_hosts_recipe.py")
N_DEVICES = 8
LOST_AFTER_S = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder, out = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("corpora") / "small"
    draw = random.Random(0)
    for i in range(40):
        lines = [
            " ".join(draw.choices(["def", "return", "import", "class", "value", "number", "list", "print"], k=8))
            for _ in range(2)
        ]
        (folder / f"{i}.txt").write_text("\n".join(lines * 4))
    data.build(data.CorpusConfig(sources=(data.TextFolder(path=folder),), rules=(), vocabulary=280), out)
    return out


class Processes:
    """The recipe in n processes that share eight devices."""

    def __init__(self, n: int, corpus: Path, out: Path, *options: str, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.started = [
            subprocess.Popen(
                [sys.executable, str(RECIPE), str(corpus), str(out), *options],
                env=tiny.environment(N_DEVICES // n)
                | {"EFFTRAIN_COORDINATOR": address, "EFFTRAIN_PROCESSES": str(n), "EFFTRAIN_PROCESS": str(process)}
                | {"EFFTRAIN_CONNECT_S": "60", "EFFTRAIN_LOST_AFTER_S": str(LOST_AFTER_S)}
                | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(n)
        ]

    def finish(self) -> list[tuple[int, str]]:
        """(exit code, standard error) of each."""
        try:
            said = [process.communicate(timeout=150)[1] for process in self.started]
        finally:
            for process in self.started:
                process.kill()
        return [(process.returncode, text) for process, text in zip(self.started, said, strict=True)]


def succeed(n: int, corpus: Path, out: Path, *options: str) -> list[str]:
    ended = Processes(n, corpus, out, *options).finish()
    assert [code for code, _ in ended] == [0] * n, ended
    return [said for _, said in ended]


def sentences(said: str) -> list[str]:
    return [line for line in said.splitlines() if "error: " in line]


def saved(out: Path) -> list[int]:
    return sorted(int(p.name) for p in (out / "checkpoints").iterdir())


def assert_same_run(out: Path, whole: Path, rel: float = 1e-6) -> None:
    """Losses to ``rel``. Norms of gradients to 1e-5: sums in another order differ by bits that Adam makes larger from
    step to step (1.6e-6 in step 12 of two processes, where losses are 1e-7 apart)."""
    for split in ("train", "validation"):
        got, want = read_metrics(out, split), read_metrics(whole, split)
        assert [row["step"] for row in got] == [row["step"] for row in want]
        for name in ("loss", "grad_norm") if split == "train" else ("loss", "bpb"):
            bound = 1e-5 if name == "grad_norm" else rel
            assert [row[name] for row in got] == pytest.approx([row[name] for row in want], rel=bound), name


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """One process, eight devices, nothing happens."""
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed(1, corpus, out)
    assert [row["step"] for row in read_metrics(out)] == list(range(1, STEPS + 1))
    assert [row["step"] for row in read_metrics(out, "validation")] == [EVAL_EVERY, STEPS]
    return out


def test_two_processes_give_the_losses_of_one_and_only_the_first_speaks(corpus, whole, tmp_path):
    first, second = succeed(2, corpus, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
    assert saved(tmp_path / "run") == saved(whole) == [4, 8, 12]
    assert "train: " in first
    assert second == ""


@pytest.mark.parametrize("victim", [1, 0])
def test_where_a_process_is_killed_the_others_end_with_one_sentence_and_the_run_continues(
    corpus, whole, tmp_path, victim
):
    """Victim 0 is the coordinator: JAX alone aborts without a word. Victim 1: JAX alone waits for the heartbeat."""
    out = tmp_path / "run"
    ended = Processes(2, corpus, out, f"die_at=7:{signal.SIGKILL}:{victim}").finish()
    assert ended[victim][0] == -signal.SIGKILL
    code, said = ended[1 - victim]
    assert code == 76, said
    (sentence,) = sentences(said)
    assert f"process {victim} of this run ended or cannot be reached" in sentence
    assert saved(out) == [4]
    if victim == 1:
        assert "continuing from step 4" in succeed(2, corpus, out)[0]
        assert_same_run(out, whole)


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory) -> Path:
    """Two processes, of which the second gets SIGTERM at the second of four batches of the evaluation after step 6."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    ended = Processes(2, corpus, out, f"die_evaluating=2:{signal.SIGTERM}:1", "checkpoint_every=50").finish()
    assert [code for code, _ in ended] == [75, 75], ended
    assert "SIGTERM on process 1: saved step 6" in ended[0][1]
    return out


def test_sigterm_to_one_process_ends_the_evaluation_of_all_and_saves_that_step(stopped):
    assert saved(stopped) == [6]
    assert [row["step"] for row in read_metrics(stopped)] == list(range(1, 7))
    assert read_metrics(stopped, "validation") == []


def test_sigterm_to_one_process_between_evaluations_saves_the_same_step_on_all(corpus, tmp_path):
    ended = Processes(2, corpus, tmp_path / "run", f"die_at=2:{signal.SIGTERM}:1", "checkpoint_every=50").finish()
    assert [code for code, _ in ended] == [75, 75], ended
    assert "SIGTERM on process 1: saved step 3" in ended[0][1]
    assert saved(tmp_path / "run") == [3]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(("n", "mesh"), [(1, "fsdp-4+tensor-2"), (4, "fsdp--1")])
def test_a_run_continues_with_another_number_of_processes_and_another_mesh(corpus, whole, stopped, tmp_path, n, mesh):
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    assert "continuing from step 6" in succeed(n, corpus, out, f"mesh={mesh}", "checkpoint_every=50")[0]
    assert_same_run(out, whole, rel=1e-5)


def test_two_processes_share_a_teacher(corpus, whole, tmp_path):
    """Of whose checkpoint each reads its part."""
    teacher = Path(shutil.copytree(whole, tmp_path / "teacher"))
    shutil.copyfile(corpus / "tokenizer.json", teacher / "tokenizer.json")
    succeed(2, corpus, tmp_path / "two", f"teacher={teacher}")
    succeed(1, corpus, tmp_path / "one", f"teacher={teacher}")
    assert_same_run(tmp_path / "two", tmp_path / "one", rel=1e-5)
    learned = [row["loss/teacher"] for row in read_metrics(tmp_path / "two")]
    assert learned == pytest.approx([row["loss/teacher"] for row in read_metrics(tmp_path / "one")], rel=1e-5)
    assert learned[-1] < learned[0]
    assert not list((tmp_path / "two").rglob("*teacher*"))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp-1+tensor-4+replica-2", "fsdp-1+replica-8", "fsdp-2+context-4"])
def test_other_meshes_give_the_losses_of_one_process(corpus, whole, tmp_path, mesh):
    succeed(2, corpus, tmp_path / "run", f"mesh={mesh}")
    assert_same_run(tmp_path / "run", whole, rel=1e-5)


def test_processes_with_other_configurations_stop_before_the_first_step(corpus, tmp_path):
    ended = Processes(2, corpus, tmp_path / "run", "seed1=5").finish()
    assert [code for code, _ in ended] == [2, 2], ended
    for _, said in ended:
        (sentence,) = sentences(said)
        assert "process 1 differs from process 0 in configuration.training.seed: 0 -> 5" in sentence
    assert not (tmp_path / "run").exists()


def test_a_folder_that_one_process_does_not_share_stops_all_before_the_first_step(corpus, tmp_path):
    out = tmp_path / "run"
    ended = Processes(2, corpus, out, "not_shared=1").finish()
    assert [code for code, _ in ended] == [2, 2], ended
    for _, said in ended:
        (sentence,) = sentences(said)
        assert "on process 1 is not the folder of process 0" in sentence
    assert not (out / "metrics.jsonl").exists()


def test_a_coordinator_that_is_not_there_is_one_sentence(tmp_path):
    start = time.monotonic()
    environment = {"EFFTRAIN_COORDINATOR": "127.0.0.1:1", "EFFTRAIN_PROCESSES": "2", "EFFTRAIN_CONNECT_S": "2"}
    for process, what in ((1, "the coordinator 127.0.0.1:1 cannot be reached"), (0, "did not meet at the coordinator")):
        done = subprocess.run(
            [sys.executable, "-c", "import several_hosts_recipe as r; r.exit_cleanly()(r.hosts.connect)()"],
            env=os.environ | environment | {"EFFTRAIN_PROCESS": str(process)},
            cwd=RECIPE.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2, done.stderr
        (sentence,) = sentences(done.stderr)
        assert what in sentence
    assert time.monotonic() > start + 4  # both waited as long as they were told
