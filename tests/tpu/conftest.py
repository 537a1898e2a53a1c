"""A machine with the scripts of tpu/ in a git checkout, a recording gcloud, and workers that are home directories."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fake_gcloud
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "tpu"

# On the workers. The job does what the world says: "sleep" until SIGTERM and then save (75), "exit N",
# "vanish", or "writes" the recipe that it was given to runs/dense.
EFFTRAIN = """#!/usr/bin/env bash
echo "job: $*" | tee -a "$HOME/jobs"
case $STUB_JOB in
    exit*) exit "${STUB_JOB#exit }" ;;
    vanish) kill -9 "$PPID" $$ ;;
    writes) mkdir -p runs/dense && cat "$2" >>runs/dense/metrics.jsonl && exit 0 ;;
    slow) trap 'sleep 1.5; exit 75' TERM ;;
    *) trap 'exit 75' TERM ;;
esac
for _ in {1..600}; do sleep 0.1; done
"""
UV = """#!/usr/bin/env bash
echo "uv $*" >>"$HOME/uv-calls"
[[ $1 != venv ]] || mkdir -p "${@: -1}/bin"
if [[ $1 == pip ]]; then
    bin=$HOME/efftrain/venv/bin
    cp "$STUB_ROOT/efftrain" "$bin/efftrain"
fi
if [[ $1 == venv ]]; then printf '#!/bin/sh\\n' >"${@: -1}/bin/python"; chmod +x "${@: -1}/bin/python"; fi
"""


class Machine:
    """Where a test calls the scripts."""

    def __init__(self, root: Path):
        self.root, self.checkout = root, root / "checkout"
        for folder in ("bin", "hosts", "tmp", "home"):
            (root / folder).mkdir()
        self.executable("bin/gcloud", f"#!{sys.executable} -IS\n" + Path(fake_gcloud.__file__).read_text())
        self.executable("bin/hostname", '#!/bin/sh\necho "${STUB_HOST:-here}"\n')
        self.executable("bin/uv", UV)
        self.executable("efftrain", EFFTRAIN)
        self._make_checkout()
        self.set()

    def executable(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)
        (self.root / name).chmod(0o755)

    def _make_checkout(self) -> None:
        shutil.copytree(SCRIPTS, self.checkout / "tpu")
        (self.checkout / "recipes").mkdir()
        (self.checkout / "recipes/dense.py").write_text("committed\n")
        (self.checkout / "old.py").write_text("old\n")
        (self.checkout / ".gitignore").write_text("runs/\n")
        self.git("init", "-q")
        self.git("add", ".")
        self.git("commit", "-q", "-m", "first")

    def git(self, *words: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        command = ["git", *identity, "-C", str(self.checkout), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def set(self, **world) -> None:
        """The world: by default no TPU; two workers a slice; the next TPU is ACTIVE at once and for ever."""
        base = {"name": "n", "slices": 1, "workers": 2, "states": [], "lives": [{"states": ["ACTIVE"]}], "job": "sleep"}
        base |= {"fail": {}, "unprepared": [], "broken_workers": [], "node_states": {}}
        (self.root / "world.json").write_text(json.dumps(base | world))

    def change(self, **world) -> None:
        now = json.loads((self.root / "world.json").read_text())
        (self.root / "world.json").write_text(json.dumps(now | world))

    def active(self, **world) -> None:
        self.set(states=["ACTIVE"], **world)

    def run(self, script: str, *words: str, **more) -> subprocess.CompletedProcess:
        command = [str(self.checkout / "tpu" / f"{script}.sh"), *words]
        return subprocess.run(
            command, env=self.environment(**more), capture_output=True, text=True, check=False, timeout=120
        )

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "STUB_ROOT": str(self.root),
            "CLOUDSDK_CORE_PROJECT": "p",
            "CLOUDSDK_COMPUTE_ZONE": "z",
            "TPU_POLL_SECONDS": "0",
        } | more

    def calls(self, *verbs: str) -> list[str]:
        """The commands that gcloud got, as lines; only those whose verb is among ``verbs``, if given."""
        log = self.root / "calls.jsonl"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [shlex.join(["gcloud", *call]) for call in calls if not verbs or verbs_of(call) in verbs]

    def verbs(self, *among: str) -> list[str]:
        """The order of events: create, delete, scp, and ssh by what it does on the workers."""
        events = []
        for line in self.calls():
            words = shlex.split(line)[1:]
            verb = verbs_of(words)
            if verb == "ssh":
                command = next(word for word in words if word.startswith("--command="))
                verb = next(
                    name
                    for name in ("install", "start", "stop", "status", "log", "follow")
                    if f"worker.sh {name}" in command
                )
            events.append(verb)
        return [event for event in events if event in among]

    def host(self, name: str) -> Path:
        return self.root / "hosts" / name

    def jobs(self, name: str) -> list[str]:
        """The commands that were started on a worker."""
        file = self.host(name) / "jobs"
        return file.read_text().splitlines() if file.exists() else []


def verbs_of(call: list[str]) -> str:
    return "node" if call[2:4] == ["tpu-vm", "describe"] else call[3] if call[0] == "compute" else " ".join(call[:2])


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    yield made
    for home in (tmp_path / "hosts").glob("*"):
        fake_gcloud.kill_jobs(home)
