"""watch.sh: a run goes on through preemptions, and nothing is tried for ever."""

import subprocess
import time

import pytest

RECIPE = ("--", "recipes/dense.py", "v6e-8", "--training.checkpoints", "gs://b/dense")
EVENTS = ("create", "delete", "install", "start")
WAIT, ON = "WAITING_FOR_RESOURCES", "ACTIVE"


def watch(machine, *words, recipe=RECIPE):
    return machine.run("watch", "n", "--type", "v6e-8", "--spot", *words, *recipe)


def test_from_nothing_to_a_finished_run(machine):
    machine.set(lives=[{"states": [WAIT, WAIT, "PROVISIONING", ON], "job": "exit 0"}])
    done = watch(machine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.verbs(*EVENTS) == ["create", "install", "start"]
    assert "--spot" in machine.calls("create")[0]
    assert machine.jobs("n-w1") == [
        "job: train ../src/recipes/dense.py v6e-8 --training.checkpoints gs://b/dense --max-restarts 3"
    ]
    assert "finished on all workers" in done.stdout
    assert "costs money while it is ACTIVE; delete it with" in done.stdout
    assert machine.calls("delete") == []


def test_after_a_preemption_the_same_launch_goes_to_a_new_tpu(machine):
    first = {"states": [WAIT, *[ON] * 12, "SUSPENDING", "SUSPENDED"]}
    machine.set(lives=[first, {"states": [WAIT, "PROVISIONING", ON], "job": "exit 0"}])
    done = watch(machine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.verbs(*EVENTS) == ["create", "install", "start", "delete", "create", "install", "start"]
    creates, starts = machine.calls("create"), [call for call in machine.calls("ssh") if "worker.sh start" in call]
    assert creates[0] == creates[1]
    assert starts[0] == starts[1]
    assert "the TPU is SUSPENDED; recovery 1 of 20" in done.stdout


def test_one_preempted_slice_of_an_active_tpu_replaces_all(machine):
    first = {"states": [ON], "node_states": {"n-1": "PREEMPTED"}}
    machine.set(lives=[first, {"states": [ON], "job": "exit 0"}])
    done = watch(machine, "--slices", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.verbs(*EVENTS) == ["create", "delete", "create", "install", "start"]
    assert "a slice was preempted; recovery 1 of 20" in done.stdout


def test_a_job_that_was_lost_on_a_tpu_that_stays_is_launched_again(machine):
    machine.set(lives=[{"states": [ON], "job": "vanish"}])
    done = watch(machine, "--max-recoveries", "2")
    assert done.returncode == 5
    assert machine.verbs(*EVENTS) == ["create", "install", "start", "start", "start"]
    assert "2 recoveries are used up; n may exist" in done.stderr


def test_a_preemption_storm_ends(machine):
    machine.set(lives=[{"states": ["SUSPENDED"]} for _ in range(9)])
    done = watch(machine, "--max-recoveries", "3")
    assert done.returncode == 5
    assert machine.verbs(*EVENTS).count("create") == 4
    assert "delete.sh n --project p --zone z" in done.stderr


def test_a_job_that_failed_is_not_launched_again_and_shows_its_last_words(machine):
    machine.set(lives=[{"states": [ON], "job": "exit 2"}])
    done = watch(machine)
    assert done.returncode == 6
    assert machine.verbs(*EVENTS) == ["create", "install", "start"]
    assert "the job failed (exit code 2)" in done.stderr
    assert "[n-w0] job: train" in done.stderr


def test_no_quota_ends_the_watch(machine):
    machine.set(fail={"create": ["ERROR: RESOURCE_EXHAUSTED"]})
    done = watch(machine)
    assert done.returncode == 4
    assert machine.verbs(*EVENTS) == ["create"]
    assert "nothing was created" in done.stderr


def test_a_worker_that_cannot_be_installed_is_tried_five_times_and_no_more(machine):
    machine.active(fail={"scp": ["ERROR: connection refused"] * 99})
    done = watch(machine)
    assert done.returncode == 1
    assert machine.verbs("scp") == ["scp"] * 5
    assert "the job could not be started, five times in a row" in done.stderr


def test_moments_in_which_nothing_can_be_read_are_survived(machine):
    machine.set(fail={"describe": ["ERROR: 503"] * 4}, lives=[{"states": [ON], "job": "exit 0"}])
    assert watch(machine).returncode == 0


def test_five_of_them_are_not(machine):
    machine.set(fail={"describe": ["ERROR: 503"] * 99})
    done = watch(machine)
    assert done.returncode == 1
    assert len(machine.calls("describe")) == 5
    assert "the state of the TPU cannot be read, five times in a row" in done.stderr


def test_what_stop_ended_stays_ended(machine):
    machine.active()
    machine.run("install", "n")
    machine.run("launch", "n", *RECIPE)
    machine.run("stop", "n")
    done = watch(machine)
    assert done.returncode == 3
    assert machine.verbs("start") == ["start"]


def test_a_running_job_is_taken_over_and_survives_the_watcher(machine):
    machine.active()
    machine.run("install", "n")
    machine.run("launch", "n", *RECIPE)
    command = [str(machine.checkout / "tpu/watch.sh"), "n", "--type", "v6e-8", *RECIPE]
    watcher = subprocess.Popen(
        command, env=machine.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(1.5)
    watcher.terminate()
    errors = watcher.communicate(timeout=30)[1]
    assert watcher.returncode == 1
    assert "the script stopped watching, but a running job continues; n may exist" in errors
    assert machine.verbs("start") == ["start"]
    assert "worker n-w0 running" in machine.run("status", "n").stdout


@pytest.mark.parametrize("given", [(), ("--slices", "2", "--service-account", "a@b", "--max-restarts", "1")])
def test_the_options_reach_create_and_launch(machine, given):
    printed = watch(machine, *given, "--dry-run").stdout
    if given:
        assert "--node-count=2 --node-prefix=n" in printed
        assert "--service-account=a@b" in printed
        assert "--max-restarts\\ 1" in printed
    else:
        assert "--node-id=n" in printed
        assert "--max-restarts\\ 3" in printed
    assert machine.calls() == []
