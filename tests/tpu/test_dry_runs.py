"""--dry-run prints exactly what would be called, and calls nothing; --help is the head of the script."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

STATE = "gcloud compute tpus queued-resources describe n --project=p --zone=z --format=value\\(state.state\\)"
ON_ALL = "gcloud compute tpus queued-resources ssh n --project=p --zone=z --node=all --worker=all"
COMMANDS = {
    "create": ("n --type v5litepod-16 --spot", [
        "gcloud compute tpus queued-resources create n --project=p --zone=z --node-id=n --accelerator-type=v5litepod-16"
        " --runtime-version=v2-alpha-tpuv5-lite --spot",
        STATE,
    ]),
    "install": ("n", [
        "mktemp -d /tmp/efftrain.XXXXXX",
        "git clone --quiet --depth 1 file://CHECKOUT /tmp/efftrain.XXXXXX/src",
        "(cd CHECKOUT && git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf -)"
        " | tar -C /tmp/efftrain.XXXXXX/src -xf -",
        "tar -C /tmp/efftrain.XXXXXX -czf /tmp/efftrain.XXXXXX/efftrain-src.tgz src",
        "gcloud compute tpus queued-resources scp /tmp/efftrain.XXXXXX/efftrain-src.tgz n:efftrain-src.tgz --project=p"
        " --zone=z --node=all --worker=all",
        f"{ON_ALL} --command=set\\ -e\\;\\ rm\\ -rf\\ efftrain/src.new\\;\\ mkdir\\ -p\\ efftrain/src.new"
        "\\;\\ tar\\ -xzf\\ efftrain-src.tgz\\ --strip-components=1\\ -C\\ efftrain/src.new"
        "\\;\\ rm\\ efftrain-src.tgz\\;\\ bash\\ "
        "efftrain/src.new/tpu/worker.sh\\ install",
    ]),
    "launch": ("n -- recipes/dense.py v5e-64 --out runs/x", [
        f"{ON_ALL} --command=bash\\ efftrain/src/tpu/worker.sh\\ start\\ efftrain\\ train\\ ../src/recipes/dense.py"
        "\\ v5e-64\\ --out\\ runs/x\\ --max-restarts\\ 3",
    ]),
    "logs": ("n --follow --worker 1", [
        "gcloud compute tpus queued-resources ssh n --project=p --zone=z --node=0 --worker=1"
        " --command=bash\\ efftrain/src/tpu/worker.sh\\ follow\\ 20",
    ]),
    "fetch": ("n runs/x here/x", [
        "mkdir -p here",
        "gcloud compute tpus queued-resources scp n:efftrain/work/runs/x here/x --project=p --zone=z --node=0"
        " --worker=0 --recurse",
    ]),
    "delete": ("n", ["gcloud compute tpus queued-resources delete n --project=p --zone=z --force --quiet"]),
}  # fmt: skip
OTHERS = {
    "stop": "n",
    "status": "n",
    "logs": "n",
    "fetch": "n gs://b/x here",
    "watch": "n --type v6e-8 --slices 2 -- recipes/dense.py c",
}


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.smoke
def test_the_commands_are_printed_and_not_run(machine, script):
    words, expected = COMMANDS[script]
    first, dashes, rest = words.partition(" -- ")
    done = machine.run(script, *first.split(), "--dry-run", *(["--", *rest.split()] if dashes else []))
    assert done.returncode == 0, done.stderr
    assert [line.replace(str(machine.checkout), "CHECKOUT") for line in done.stdout.splitlines()] == expected
    assert machine.calls() == []
    assert list((machine.root / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    "script", ["create", "install", "launch", "stop", "status", "logs", "fetch", "watch", "delete"]
)
def test_help_is_the_head_of_the_script(machine, script):
    done = machine.run(script, "--help")
    assert done.returncode == 0
    assert f"{script}.sh " in done.stdout
    assert "--dry-run" in done.stdout
    assert "set -euo" not in done.stdout
    assert machine.calls() == []


def test_a_dry_run_needs_no_gcloud(machine):
    (machine.root / "bin/gcloud").unlink()
    assert machine.run("delete", "n", "--dry-run", PATH=f"{machine.root / 'bin'}:/usr/bin:/bin").returncode == 0


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="the Google Cloud CLI is not installed")
def test_the_real_gcloud_knows_every_command_and_flag(machine):
    """By its own linter, which needs neither an account nor a network."""
    lines = []
    for script, (words, _) in [*COMMANDS.items(), *((name, (words, None)) for name, words in OTHERS.items())]:
        first, dashes, rest = words.partition(" -- ")
        done = machine.run(script, *first.split(), "--dry-run", *(["--", *rest.split()] if dashes else []))
        lines += [line for line in done.stdout.splitlines() if line.startswith("gcloud ")]
    assert len(lines) > 10
    # The linter splits at spaces and knows no quotes, and what the worker does is not its business.
    plain = {" ".join(word.split(" ")[0] for word in shlex.split(line)) for line in lines}
    for line in sorted(plain):
        command = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"]
        folder = Path(shutil.which("gcloud")).parent
        environment = machine.environment(CLOUDSDK_CONFIG=str(machine.root / "config"), PATH=f"{folder}:/usr/bin:/bin")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        (verdict,) = json.loads(done.stdout)
        assert verdict["success"], (line, verdict["error_message"])
