"""Reads the result files of benchmarks and comparisons, and formats what the tables of the guides show of them."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


@cache
def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def bpb(result: str, variant: str) -> list[float]:
    """Bits per byte of each seed."""
    return read(result)["variants"][variant]["bpb"]["values"]


def figure(result: str, variant: str, name: str) -> float:
    """A figure of a scorecard, the mean over seeds."""
    return read(result)["variants"][variant][name]["mean"]


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(*names: str) -> str:
    """For each result file its command, commit and machine; RESULTS is the path from the guide to the results."""
    if len(names) == 1:
        return f"\nSource: {_origin(*names)}."
    return "\nSources:\n\n" + "\n".join(f"- {_origin(name)}" for name in names)


def _origin(name: str) -> str:
    result = read(name)
    link = f"[{name}.json](RESULTS/{name}.json)"
    if (about := result.get("environment")) is None:
        return f"{link}: `{result['command']}`, commit {result['commit']}, 2 shared cores"
    command = result.get("command")
    if command is None:
        script, *flags = about["command"]
        command = " ".join(["python", script[max(script.find("recipes/"), 0) :], *flags])
    return f"{link}: `{command}`, commit {about['commit']}, {machine(about)}"


def machine(about: dict[str, Any]) -> str:
    name = about["cpu"].replace("(R)", "").removesuffix(" Processor")
    return f"{about['cpu_cores']} cores of an {name}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds; the value alone where there is one seed."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.{3 if abs(share) < 5e-4 else 2}f} %"


def above(values: Sequence[float], base: Sequence[float]) -> list[str]:
    """By how much the bits per byte of a model exceed those of its baseline, for each seed."""
    return [percent(value / of - 1) for value, of in zip(values, base, strict=True)]


def fewer(values: Sequence[float], base: Sequence[float], digits: int = 1) -> str:
    """By how many percent the bits per byte of a model are below those of its baseline, for each seed."""
    return ", ".join(f"{100 * (1 - value / of):.{digits}f}" for value, of in zip(values, base, strict=True))


def times(ratios: Iterable[float]) -> list[str]:
    return [f"{ratio:.2f}" for ratio in ratios]


def step_ratio(result: dict[str, Any], name: str, base: str) -> str:
    """The time of a training step over that of another."""
    return f"{result['step_s'][name] / result['step_s'][base]:.2f}"
