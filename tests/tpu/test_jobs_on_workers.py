"""install.sh, launch.sh, stop.sh, status.sh, logs.sh, fetch.sh: worker.sh runs for real, in a home for each worker."""

import subprocess
import time
from pathlib import Path

import pytest

RECIPE = ("--", "recipes/dense.py", "v5e-64")


def wait_for(condition) -> None:
    for _ in range(100):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within 10 s")


@pytest.fixture
def installed(machine):
    machine.active()
    assert machine.run("install", "n").returncode == 0
    return machine


def test_install_carries_the_commit_and_the_changes_to_every_worker(machine):
    machine.active(slices=2)
    (machine.checkout / "recipes/dense.py").write_text("changed\n")
    (machine.checkout / "recipes/a new one.py").write_text("untracked\n")
    (machine.checkout / "old.py").unlink()
    (machine.checkout / "runs").mkdir()
    (machine.checkout / "runs/big").write_text("ignored\n")
    done = machine.run("install", "n")
    assert done.returncode == 0, done.stderr
    for host in ("n-0-w0", "n-0-w1", "n-1-w0", "n-1-w1"):
        source = machine.host(host) / "efftrain/src"
        assert (source / "recipes/dense.py").read_text() == "changed\n"
        assert (source / "recipes/a new one.py").read_text() == "untracked\n"
        assert not (source / "old.py").exists()
        assert not (source / "runs").exists()
        git = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert git.stdout.strip() == machine.git("rev-parse", "HEAD")  # what environment.json will say
        assert (machine.host(host) / "uv-calls").read_text().splitlines() == [
            f"uv venv --quiet --python 3.12 {machine.host(host)}/efftrain/venv",
            f"uv pip install --quiet --python {machine.host(host)}/efftrain/venv/bin/python --editable {source}[tpu]",
        ]
    assert list((machine.root / "tmp").iterdir()) == []  # no archive stays behind, here
    assert not (machine.host("n-0-w0") / "efftrain-src.tgz").exists()  # nor there
    assert [call.split("scp ")[1].split()[1:] for call in machine.calls("scp")] == [
        ["n:efftrain-src.tgz", "--project=p", "--zone=z", "--node=all", "--worker=all"]
    ]


def test_a_second_install_replaces_the_first_and_keeps_the_environment(installed):
    installed.git("rm", "-q", "old.py")
    installed.git("commit", "-q", "-m", "second")
    assert installed.run("install", "n").returncode == 0
    assert not (installed.host("n-w1") / "efftrain/src/old.py").exists()
    assert (installed.host("n-w1") / "uv-calls").read_text().count("uv venv") == 1


def test_a_job_starts_outside_of_the_source_and_its_run_outlives_an_install(installed):
    """The job writes a file to its working directory, as a recipe does with --out runs/dense."""
    installed.change(job="writes")
    installed.run("launch", "n", *RECIPE)
    wait_for(lambda: "finished 0" in installed.run("status", "n").stdout)
    home = installed.host("n-w0") / "efftrain"
    assert [path.relative_to(home) for path in home.rglob("metrics.jsonl")] == [Path("work/runs/dense/metrics.jsonl")]
    assert installed.run("install", "n").returncode == 0
    assert (home / "work/runs/dense/metrics.jsonl").read_text() == "committed\n"  # the recipe, read from there
    installed.run("launch", "n", *RECIPE)
    wait_for(lambda: "finished 0" in installed.run("status", "n").stdout)
    assert (home / "work/runs/dense/metrics.jsonl").read_text() == "committed\n" * 2


def test_an_install_keeps_what_earlier_versions_left_in_the_source(machine):
    machine.active(workers=1)
    old = machine.host("n-w0") / "efftrain/src"
    for folder in ("runs/dense", "my-runs", "recipes"):
        (old / folder).mkdir(parents=True)
    (old / "runs/dense/metrics.jsonl").write_text("{}")
    (old / "my-runs/notes").write_text("irreplaceable")
    (old / "recipes/dense.py").write_text("old\n")
    for _ in range(2):
        assert machine.run("install", "n").returncode == 0
        work = machine.host("n-w0") / "efftrain/work"
        assert (work / "runs/dense/metrics.jsonl").read_text() == "{}"
        assert (work / "my-runs/notes").read_text() == "irreplaceable"
        assert (old / "recipes/dense.py").read_text() == "committed\n"
        assert not (old / "my-runs").exists()


def test_install_under_a_running_job_is_refused(installed):
    installed.run("launch", "n", *RECIPE)
    done = installed.run("install", "n")
    assert done.returncode == 6
    assert "n-w0: a job is running; stop it first with stop.sh" in done.stderr


def test_a_worker_that_ssh_does_not_reach_is_counted_and_the_leftover_named(machine):
    machine.active(workers=4, broken_workers=["n-w2"])
    done = machine.run("install", "n")
    assert done.returncode == 6
    assert "error: install: 3 of 4 workers confirmed; those that did: n-w0 n-w1 n-w3" in done.stderr
    assert "n exists in state ACTIVE" in done.stderr.splitlines()[-1]
    assert len(machine.calls("ssh")) == 1  # gcloud itself tries for a minute; more would be a storm


def test_a_slice_that_gcloud_leaves_out_without_a_word_is_noticed(machine):
    machine.active(slices=2, unprepared=["n-1"])
    done = machine.run("install", "n")
    assert done.returncode == 6
    assert "2 of 4 workers confirmed; those that did: n-0-w0 n-0-w1" in done.stderr


def test_nothing_is_sent_to_a_tpu_with_a_preempted_slice(machine):
    machine.active(slices=2, node_states={"n-1": "PREEMPTED"})
    done = machine.run("launch", "n", *RECIPE)
    assert done.returncode == 3
    assert "not READY: slice n-1 PREEMPTED, 2 workers" in done.stderr
    assert machine.calls("ssh") == []


@pytest.mark.parametrize("state", ["WAITING_FOR_RESOURCES", "SUSPENDED", "ABSENT"])
def test_without_an_active_tpu_nothing_is_sent(machine, state):
    machine.set(states=[] if state == "ABSENT" else [state])
    done = machine.run("install", "n")
    assert done.returncode == 3
    assert machine.calls("scp", "ssh") == []


def test_a_launched_job_gets_its_words_unchanged_and_outlives_the_session(installed):
    done = installed.run("launch", "n", "--max-restarts", "5", *RECIPE, "--out", "a b/'$HOME'", "--lr", "1e-3")
    assert done.returncode == 0, done.stderr
    for host in ("n-w0", "n-w1"):
        assert installed.jobs(host) == [
            "job: train ../src/recipes/dense.py v5e-64 --out a b/'$HOME' --lr 1e-3 --max-restarts 5"
        ]
    assert "worker n-w0 running\nworker n-w1 running\n" in installed.run("status", "n").stdout


def test_a_second_launch_does_not_start_a_second_job(installed):
    installed.run("launch", "n", *RECIPE)
    again = installed.run("launch", "n", *RECIPE)
    assert again.returncode == 6
    assert "a job is running already" in again.stderr
    assert len(installed.jobs("n-w0")) == 1


def test_where_one_worker_does_not_start_the_others_are_stopped_again(machine):
    machine.active(workers=3)
    machine.run("install", "n")
    machine.change(broken_workers=["n-w1"])
    done = machine.run("launch", "n", *RECIPE)
    assert done.returncode == 6
    assert "launch: 2 of 3 workers confirmed; those that did: n-w0 n-w2" in done.stderr
    assert "not started on every worker, so it was stopped again on the others" in done.stderr
    machine.change(broken_workers=[])
    assert "worker n-w0 stopped 75\nworker n-w1 none\nworker n-w2 stopped 75\n" in machine.run("status", "n").stdout


def test_stop_waits_until_the_job_has_saved(installed):
    installed.change(job="slow")  # saves for 1.5 s
    installed.run("launch", "n", *RECIPE)
    assert installed.run("stop", "n", "--seconds", "0").returncode == 6
    done = installed.run("stop", "n")
    assert done.returncode == 0, done.stderr
    assert "worker n-w0 stopped 75" in installed.run("status", "n").stdout
    assert installed.run("stop", "n").returncode == 0  # stopping nothing is fine


@pytest.mark.parametrize(("job", "shown"), [("exit 0", "finished 0"), ("exit 2", "finished 2"), ("vanish", "lost")])
def test_status_tells_an_end_with_a_code_from_one_without(installed, job, shown):
    installed.change(job=job)
    installed.run("launch", "n", *RECIPE)
    wait_for(lambda: "running" not in installed.run("status", "n").stdout)
    for worker in ("n-w0", "n-w1"):
        assert f"worker {worker} {shown}" in installed.run("status", "n").stdout


def test_a_job_of_before_a_restart_of_the_machine_is_lost_though_its_process_id_lives(installed):
    installed.run("launch", "n", *RECIPE)
    (installed.host("n-w0") / "efftrain/job/boot").write_text("an earlier one\n")
    assert "worker n-w0 lost\nworker n-w1 running\n" in installed.run("status", "n").stdout


def test_status_before_an_install(machine):
    machine.active(slices=2)
    assert machine.run("status", "n").stdout.splitlines() == [
        "n: ACTIVE",
        "slice n-0 READY, 2 workers",
        "slice n-1 READY, 2 workers",
        *[f"worker n-{i}-w{w} none" for i in range(2) for w in range(2)],
    ]


def test_logs_of_all_workers_carry_their_names(installed):
    installed.change(job="exit 3")
    installed.run("launch", "n", *RECIPE)
    wait_for(lambda: "finished 3" in installed.run("status", "n").stdout)
    lines = installed.run("logs", "n", "--lines", "2").stdout.splitlines()
    assert [line for line in lines if "job:" in line] == [
        f"[n-w{w}] job: train ../src/recipes/dense.py v5e-64 --max-restarts 3" for w in range(2)
    ]
    assert [line.split(" ", 2)[0] for line in lines] == ["[n-w0]", "[n-w0]", "[n-w1]", "[n-w1]"]
    assert lines[1].endswith("exit code 3")


def test_logs_before_a_launch_say_that_there_are_none(installed):
    done = installed.run("logs", "n")
    assert done.returncode == 6
    assert "has launch.sh been called?" in done.stderr


def test_a_run_directory_comes_from_the_disk_of_the_first_worker_once(installed, tmp_path):
    run = installed.host("n-w0") / "efftrain/work/runs/dense"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    target = tmp_path / "my runs" / "dense"
    done = installed.run("fetch", "n", "runs/dense/", str(target))
    assert done.returncode == 0, done.stderr
    assert (target / "config.json").read_text() == "{}"
    again = installed.run("fetch", "n", "runs/dense", str(target))
    assert again.returncode == 3
    assert "exists; choose another folder" in again.stderr


def test_a_run_on_a_bucket_is_synchronised_without_the_tpu(machine, tmp_path):
    assert machine.run("fetch", "n", "gs://b/runs/dense/", str(tmp_path / "dense")).returncode == 0
    assert machine.calls() == [f"gcloud storage rsync gs://b/runs/dense {tmp_path}/dense --project=p --recursive"]


def test_a_fetch_that_broke_off_says_that_the_folder_is_not_whole(machine, tmp_path):
    machine.set(fail={"rsync": ["ERROR: 403"]})
    done = machine.run("fetch", "n", "gs://b/dense", str(tmp_path / "dense"))
    assert done.returncode == 1
    assert "is incomplete; call fetch.sh again" in done.stderr
