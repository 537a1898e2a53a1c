"""create.sh, status.sh and delete.sh: what gcloud is asked for, and what a user is told when it refuses."""

import pytest

CREATE = "gcloud compute tpus queued-resources create n --project=p --zone=z"
STATE = "gcloud compute tpus queued-resources describe n --project=p --zone=z '--format=value(state.state)'"
DELETE_HINT = "delete.sh n --project p --zone z"


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("--type v5litepod-16", "--node-id=n --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"),
        ("--type v4-32", "--node-id=n --accelerator-type=v4-32 --runtime-version=tpu-ubuntu2204-base"),
        ("--type v5p-8 --spot", "--node-id=n --accelerator-type=v5p-8 --runtime-version=v2-alpha-tpuv5 --spot"),
        (
            "--type v6e-64 --slices 2 --spot --service-account me@p.iam",
            "--node-count=2 --node-prefix=n --accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --spot"
            " --service-account=me@p.iam",
        ),
    ],
)
def test_the_request_names_type_image_slices_and_tier(machine, words, flags):
    done = machine.run("create", "n", *words.split())
    assert done.returncode == 0, done.stderr
    assert machine.calls("create") == [f"{CREATE} {flags}"]


def test_it_waits_through_the_queue_until_the_tpu_is_active(machine):
    machine.set(lives=[{"states": ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]}])
    done = machine.run("create", "n", "--type", "v6e-8")
    assert done.returncode == 0
    assert machine.calls("describe") == [STATE] * 4
    shown = [line for line in done.stderr.splitlines() if line.startswith("n: ")]
    assert shown == ["n: WAITING_FOR_RESOURCES", "n: PROVISIONING", "n: ACTIVE"]  # one line a change, not a look
    assert "install.sh n --project p --zone z" in done.stdout


def test_without_waiting_it_only_asks(machine):
    assert machine.run("create", "n", "--type", "v6e-8", "--wait", "0").returncode == 0
    assert len(machine.calls()) == 1


def test_no_quota_ends_at_once_and_says_that_nothing_was_created(machine):
    message = "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' exceeded"
    machine.set(fail={"create": [message]})
    done = machine.run("create", "n", "--type", "v6e-8", "--spot")
    assert done.returncode == 4
    assert "RESOURCE_EXHAUSTED" in done.stderr  # gcloud's own words
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the quota of p in z does not allow 1 x v6e-8 spot;")
    assert last.endswith("nothing was created")
    assert len(machine.calls("create")) == 1


def test_a_failed_request_that_left_something_behind_says_how_to_delete_it(machine):
    machine.set(states=["ACCEPTED"], fail={"create": ["ERROR: RESOURCE_EXHAUSTED: quota"]})
    done = machine.run("create", "n", "--type", "v6e-8")
    assert done.returncode == 4
    assert "n exists in state ACCEPTED" in done.stderr
    assert DELETE_HINT in done.stderr


def test_a_name_that_is_taken_is_not_touched(machine):
    machine.active()
    done = machine.run("create", "n", "--type", "v6e-8")
    assert done.returncode == 3
    assert "the TPU n exists already" in done.stderr
    assert machine.calls("delete") == []


def test_a_request_that_fails_in_the_queue_is_shown_with_its_reason_and_not_repeated(machine):
    machine.set(lives=[{"states": ["WAITING_FOR_RESOURCES", "FAILED"]}])
    done = machine.run("create", "n", "--type", "v6e-8")
    assert done.returncode == 3
    assert "failedData: no capacity" in done.stderr
    assert "n exists in state FAILED" in done.stderr
    assert DELETE_HINT in done.stderr
    assert len(machine.calls("create")) == 1


def test_an_endless_queue_ends_the_wait_and_says_that_the_request_stays(machine, monkeypatch):
    machine.set(lives=[{"states": ["WAITING_FOR_RESOURCES"]}])
    common = machine.checkout / "tpu/create.sh"
    common.write_text(common.read_text().replace("wait * 60", "wait * 0"))
    done = machine.run("create", "n", "--type", "v6e-8", "--wait", "7")
    assert done.returncode == 5
    assert "no TPU after 7 minutes; the request stays in the queue" in done.stderr
    assert DELETE_HINT in done.stderr


def test_a_login_that_ran_out_is_named(machine):
    machine.active(fail={"describe": ["ERROR: Reauthentication failed"]})
    done = machine.run("status", "n")
    assert done.returncode == 1
    assert "Reauthentication failed" in done.stderr
    assert "gcloud auth login" in done.stderr.splitlines()[-1]


def test_delete_takes_the_nodes_too_and_checks_that_they_are_gone(machine):
    machine.active()
    done = machine.run("delete", "n")
    assert done.returncode == 0
    command = "gcloud compute tpus queued-resources delete n --project=p --zone=z --force --quiet"
    assert machine.calls() == [STATE, command, STATE]


def test_deleting_nothing_is_no_error(machine):
    done = machine.run("delete", "n")
    assert done.returncode == 0
    assert "nothing to delete" in done.stdout
    assert machine.calls("delete") == []


def test_a_delete_that_failed_says_that_the_tpu_is_still_there(machine):
    machine.active(fail={"delete": ["ERROR: internal"]})
    done = machine.run("delete", "n")
    assert done.returncode == 1
    assert "n exists in state ACTIVE" in done.stderr


def test_status_without_a_name_lists_what_takes_quota(machine):
    assert machine.run("status").returncode == 0
    assert machine.calls() == ["gcloud compute tpus queued-resources list --project=p --zone=z"]


@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [
        ("create", "n --type v5e-16", "--type is 'v5e-16'; give v5litepod-N (v5e)"),
        ("create", "n --type v4-7", "--type is 'v4-7'"),
        ("create", "n --type v6e-8 --slices 0", "--slices is 0"),
        ("create", "n --type v6e-8 --wait soon", "--wait is soon"),
        ("create", "n --type", "--type needs a value"),
        ("create", "--type v6e-8", "give the name of the TPU"),
        ("create", "My_TPU --type v6e-8", "My_TPU is not a valid name for a TPU"),
        ("create", "n m --type v6e-8", "unexpected argument m"),
        ("delete", "n --force", "unknown option --force"),
        ("launch", "n", "give the recipe and its configuration after --"),
        ("launch", "n -- recipes/nothing.py cpu", "there is no recipe recipes/nothing.py"),
        ("launch", "n --max-restarts x -- recipes/dense.py cpu", "--max-restarts is x"),
        ("fetch", "n runs/dense", "give NAME RUN FOLDER"),
        ("fetch", "n ../other here", "../other is not a path in ~/efftrain/work"),
        ("logs", "n --lines all", "all is not a whole number"),
        ("watch", "n --type v6e-8 --spot -- recipes/dense.py cpu", "a spot TPU loses its disks"),
        ("watch", "n -- recipes/dense.py cpu", "give the --type"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_called(machine, script, words, sentence):
    done = machine.run(script, *words.split())
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sentence}")
    assert len(done.stderr.splitlines()) == 1
    assert machine.calls() == []


def test_project_and_zone_must_be_known(machine):
    done = machine.run("delete", "n", CLOUDSDK_CORE_PROJECT="")
    assert (done.returncode, done.stderr) == (
        2,
        "error: the project is not set; give --project or set CLOUDSDK_CORE_PROJECT\n",
    )
    assert machine.run("delete", "n", "--zone", "y", "--project", "q").returncode == 0
    assert "--project=q --zone=y" in machine.calls()[0]
