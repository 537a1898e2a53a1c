"""A ``gcloud`` that records every call, keeps a little world on disk, and fails where a test says so.

``world.json`` beside it: ``states`` are what a queued resource goes through, one step a look, the last one for ever;
``lives`` are the states of the ones created later. An ssh runs its command for real, with a home directory for each
worker, so that what the scripts do there is tested too. ``fail`` maps a verb to how often and with what it fails.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORLD, CALLS = ROOT / "world.json", ROOT / "calls.jsonl"


def end(message: str, code: int = 1) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)


def kill_jobs(home: Path) -> None:
    """The machine goes away, with all that ran on it."""
    for name in ("supervisor", "pid"):
        file = home / "efftrain/job" / name
        if file.exists() and file.read_text().strip():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), 9)


def nodes(world: dict) -> list[str]:
    name = world["name"]
    return [name] if world["slices"] == 1 else [f"{name}-{i}" for i in range(world["slices"])]


def flag(arguments: list[str], name: str, default: str | None = None) -> str | None:
    found = [word.partition("=")[2] for word in arguments if word.startswith(f"--{name}=")]
    return found[0] if found else default


def homes(world: dict, arguments: list[str]) -> list[Path]:
    """Of the workers that --node and --worker choose."""
    chosen = []
    for i, node in enumerate(nodes(world)):
        for w in range(world["workers"]):
            if flag(arguments, "node", "0") in ("all", str(i)) and flag(arguments, "worker", "0") in ("all", str(w)):
                chosen.append(ROOT / "hosts" / f"{node}-w{w}")
    for home in chosen:
        home.mkdir(parents=True, exist_ok=True)
    return chosen


def create(world: dict, arguments: list[str]) -> None:
    if world["states"]:
        end("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource already exists")
    world["name"], world["slices"] = arguments[0], int(flag(arguments, "node-count", "1"))
    life = world["lives"].pop(0)
    world["states"], world["node_states"] = life["states"], life.get("node_states", {})
    world["job"] = life.get("job", "sleep")


def describe(world: dict, arguments: list[str]) -> None:
    if not world["states"]:
        end(
            f"ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource '{arguments[0]}' was not found"
        )
    wanted = flag(arguments, "format")
    if "nodeId" in wanted:
        print(*nodes(world))
    elif wanted == "value(state.state)":
        print(world["states"].pop(0) if len(world["states"]) > 1 else world["states"][0])
    else:
        print(f"state:\n  state: {world['states'][0]}\n  failedData: no capacity")


def delete(world: dict, arguments: list[str]) -> None:
    import shutil  # here, as most calls are short and many

    world["states"] = []
    for home in (ROOT / "hosts").glob("*"):
        kill_jobs(home)
        shutil.rmtree(home)


def describe_node(world: dict, arguments: list[str]) -> None:
    print(f"{world['node_states'].get(arguments[0], 'READY')}\t{world['workers']}")


def list_resources(world: dict, arguments: list[str]) -> None:
    print("NAME ZONE NODE_COUNT ACCELERATOR_TYPE STATE")


def ssh(world: dict, arguments: list[str]) -> None:
    import subprocess

    code = 0
    for home in homes(world, arguments):
        if any(home.name.startswith(node) for node in world["unprepared"]):
            continue  # what gcloud 528 does with a node that it cannot prepare
        if home.name in world["broken_workers"]:
            print(
                f"##### Command execution on worker {home.name} failed with exit status 255. Continuing.",
                file=sys.stderr,
            )
            code = 255
            continue
        environment = os.environ | {"HOME": str(home), "STUB_HOST": home.name, "STUB_JOB": world["job"]}
        done = subprocess.run(["bash", "-c", flag(arguments, "command")], env=environment, cwd=home, check=False)
        code = done.returncode or code
    if code:
        raise SystemExit(code)


def scp(world: dict, arguments: list[str]) -> None:
    import shutil

    source, target = [word for word in arguments if not word.startswith("--")]
    for home in homes(world, arguments):
        if ":" in target:
            shutil.copy(source, home / target.partition(":")[2])
        else:
            shutil.copytree(home / source.partition(":")[2], target)


def storage(world: dict, arguments: list[str]) -> None:
    pass


VERBS = {
    "compute tpus queued-resources create": create,
    "compute tpus queued-resources describe": describe,
    "compute tpus queued-resources delete": delete,
    "compute tpus queued-resources list": list_resources,
    "compute tpus queued-resources ssh": ssh,
    "compute tpus queued-resources scp": scp,
    "compute tpus tpu-vm describe": describe_node,
    "storage rsync": storage,
}


def main() -> None:
    with CALLS.open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    joined = " ".join(sys.argv[1:]) + " "
    verb = next(known for known in VERBS if joined.startswith(known + " "))
    world = json.loads(WORLD.read_text())
    if failures := world["fail"].get(verb.split()[-1] if "tpu-vm" not in verb else "node"):
        message = failures.pop(0)
        WORLD.write_text(json.dumps(world))
        if message:
            end(message)
    try:
        VERBS[verb](world, sys.argv[1 + len(verb.split()) :])
    finally:
        WORLD.write_text(json.dumps(world))


if __name__ == "__main__":
    main()
