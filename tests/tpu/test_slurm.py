"""slurm.sbatch with a stub srun and scontrol: signals, exit codes, requeueing."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tpu/slurm.sbatch"
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "srun" "$@" >>"$STUB/srun"
echo "devices=${JAX_LOCAL_DEVICE_IDS:-unset}" >>"$STUB/environment"
trap 'echo TERM >>"$STUB/signals"; sleep 0.5; exit 75' TERM
touch "$STUB/started"
[[ $STUB_END == wait ]] || exit "$STUB_END"
for _ in {1..300}; do sleep 0.1; done
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show ]] || exec >>"$STUB/requeued"
if [[ $1 == show ]]; then echo "JobId=7 JobState=$STUB_STATE Reason=None"; else echo "$*"; fi
"""


class Job:
    def __init__(self, root: Path):
        self.root = root
        (root / "bin").mkdir()
        (root / "recipes").mkdir()
        (root / "recipes/dense.py").touch()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "efftrain": "#!/bin/sh\n"}.items():
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)

    def start(self, *words: str, end: str = "0", state: str = "RUNNING", **more: str) -> subprocess.Popen:
        environment = {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}", "STUB": str(self.root), "STUB_END": end}
        environment |= {
            "STUB_STATE": state,
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS_PER_NODE": "8",
            "SLURM_GPUS_ON_NODE": "8",
        }
        words = words or ("recipes/dense.py", "gpu", "--out", "/shared/a b")
        command = ["bash", str(SCRIPT), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.root, env=environment | more, **pipes)

    def run(self, *words: str, **more: str) -> tuple[int, str]:
        process = self.start(*words, **more)
        out, errors = process.communicate(timeout=60)
        return process.returncode, out + errors

    def said(self, name: str) -> list[str]:
        file = self.root / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_each_task_trains_with_the_words_unchanged(job):
    assert job.run()[0] == 0
    assert job.said("srun") == [
        *["srun", "--kill-on-bad-exit=0", "--wait=300", "efftrain", "train"],
        *["recipes/dense.py", "gpu", "--out", "/shared/a b", "--max-restarts", "3"],
    ]
    assert job.said("requeued") == []


def test_sigterm_reaches_the_tasks_which_save_and_the_job_is_queued_again(job):
    process = job.start(end="wait")
    while not (job.root / "started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert job.said("signals") == ["TERM"]
    assert job.said("requeued") == ["requeue 7"]
    assert "saved; queued again (1 of 100)" in out


@pytest.mark.parametrize("state", ["PENDING", "CANCELLED"])
def test_what_slurm_requeued_or_the_user_cancelled_is_left_alone(job, state):
    assert job.run(end="75", state=state)[0] == 75
    assert job.said("requeued") == []


@pytest.mark.parametrize("code", ["1", "2", "143"])
def test_a_failed_job_is_not_queued_again(job, code):
    assert job.run(end=code)[0] == int(code)
    assert job.said("requeued") == []


def test_requeueing_ends(job):
    code, said = job.run(end="75", SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    assert code == 75
    assert job.said("requeued") == []
    assert "queued again 3 times already" in said


@pytest.mark.parametrize(
    ("tasks", "gpus", "devices"), [("8", "8", "unset"), ("1", "4", "0,1,2,3"), ("1", "1", "unset")]
)
def test_a_process_alone_on_a_node_takes_all_its_gpus(job, tasks, gpus, devices):
    job.run(SLURM_NTASKS_PER_NODE=tasks, SLURM_GPUS_ON_NODE=gpus)
    assert job.said("environment") == [f"devices={devices}"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("recipes/dense.py",), "give a recipe and its configuration"),
        (("recipes/other.py", "gpu"), "there is no recipe recipes/other.py in "),
    ],
)
def test_a_mistake_is_one_sentence(job, words, sentence):
    code, said = job.run(*words)
    assert code == 2
    assert said.startswith(f"error: {sentence}")
    assert job.said("srun") == []


def test_outside_of_slurm_it_says_how_to_submit(job):
    code, said = job.run(SLURM_JOB_ID="")
    assert code == 2
    assert "submit it with: sbatch tpu/slurm.sbatch" in said


def test_a_dry_run_prints_what_a_task_runs(job):
    assert job.run("--dry-run", "recipes/dense.py", "gpu", "--out", "a b", SLURM_JOB_ID="") == (
        0,
        "srun --kill-on-bad-exit=0 --wait=300 efftrain train recipes/dense.py gpu --out a\\ b --max-restarts 3\n",
    )


def test_the_directives_ask_for_an_early_signal_and_for_requeueing():
    """sbatch reads them up to the first command."""
    head = SCRIPT.read_text().split("\nset -euo")[0]
    directives = set(re.findall(r"^#SBATCH (\S+)$", head, re.MULTILINE))
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append"} <= directives
