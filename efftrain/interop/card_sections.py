"""Sections of a model card: data, training, scorecard and compression."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from efftrain.interop.card_facts import CorpusFacts, RunFacts
from efftrain.interop.markdown import code, one_line, plain, table
from efftrain.measure.scorecard.scorecard import Figure, Scorecard, show
from efftrain.train.metrics.metrics_log import Row

POINTS = 10  # of the training curve


def data(runs: list[RunFacts]) -> str:
    """The corpora of the runs that were trained here."""
    trained = [run for run in runs if run.trained]
    if not trained:
        return "" if runs[-1].imported is not None else "The run records no training, and so no data."
    texts, seen = [], []
    for run in trained:
        if run.corpus is None:
            texts.append(f"{code(run.name)} names no corpus.")
        elif run.corpus not in seen:
            seen.append(run.corpus)
            texts.append(_corpus(run.corpus))
    return "\n\n".join(texts)


def _corpus(corpus: CorpusFacts) -> str:
    if corpus.manifest is None:
        return f"The corpus {code(corpus.name)} is not described, because {corpus.missing}."
    manifest = corpus.manifest
    splits = [
        [plain(name), *(f"{split.get(column, 0):,}" for column in ("documents", "bytes", "tokens"))]
        for name, split in manifest.get("splits", {}).items()
    ]
    texts = [
        f"The corpus {code(corpus.name)}:",
        table(["Split", "Documents", "Bytes", "Tokens"], splits),
        "What was read, removed and kept:",
        table(
            ["Stage", "Documents", "Bytes"],
            [[plain(row["stage"]), f"{row['documents']:,}", f"{row['bytes']:,}"] for row in manifest.get("funnel", ())],
        ),
    ]
    sources = [
        [plain(name), f"{rows[-1]['documents']:,}", f"{rows[-1]['bytes']:,}"]
        for name, rows in manifest.get("sources", {}).items()
        if rows
    ]
    if sources:
        texts += ["What was kept of each source:", table(["Source", "Documents", "Bytes"], sources)]
    texts.append("The corpus records neither the licences nor the languages of its documents.")
    return "\n\n".join(texts)


def training(runs: list[RunFacts]) -> str:
    trained = [run for run in reversed(runs) if run.trained]
    return "\n\n".join("\n\n".join(_trained(run, len(runs) > 1)) for run in trained)


def _trained(run: RunFacts, named: bool) -> Iterator[str]:
    if named:
        yield f"### {plain(run.name)}"
    training, made = run.training, run.environment
    optimizer, schedule = training.get("optimizer") or {}, training.get("schedule") or {}
    rows = [["Steps", f"{max(row['step'] for row in run.steps):,} of {training.get('steps', 0):,}"]]
    if training.get("batch_size") and training.get("length"):
        rows.append(["Tokens of a step", f"{training['batch_size']:,} rows of {training['length']:,}"])
    for name, title in (("train_tokens", "Tokens"), ("train_flops", "FLOPs")):
        figure = run.scorecard.figures.get(name) if run.scorecard else None
        if figure is not None and figure.value is not None:
            note = f" ({plain(figure.note)})" if figure.note else ""
            rows.append([title, f"{figure.value:,.0f}{note}" if name == "train_tokens" else f"{show(figure)}{note}"])
    if optimizer:
        peak = f", peak learning rate {optimizer['peak_lr']:g}" if "peak_lr" in optimizer else ""
        decay = f", {plain(schedule['type'])}" if "type" in schedule else ""
        rows.append(["Optimizer", f"{plain(optimizer.get('type'))}{peak}{decay}"])
    if isinstance(run.settings.get("teacher"), str):
        rows.append(["Teacher", code(PurePath(run.settings["teacher"]).name)])
    rows.append(["Recipe", code(run.settings.get("type"))] if run.settings.get("type") else ["Recipe", "not recorded"])
    if made.get("command"):
        rows.append(["Command", code(_command(made["command"]))])
    packages = made.get("packages") or {}
    versions = ", ".join(f"{plain(name)} {plain(packages[name])}" for name in ("efftrain", "jax") if name in packages)
    commit = f"commit {code(made['commit'])}" if made.get("commit") else ""
    if code_of := ", ".join(filter(None, (versions, commit))):
        rows.append(["Code", code_of])
    if made.get("time"):
        rows.append(["Started", f"{plain(made['time'])} on {_machine(made)}"])
    yield table(["", ""], rows)
    yield _curve(run.steps, run.evaluations)


def _command(words: Sequence[str]) -> str:
    """The command line without the folders of the machine, which say nothing elsewhere."""
    shown = [re.sub(r"(?:(?<==)|\A)/.*", lambda path: PurePath(path[0]).name, one_line(word)) for word in words]
    return shlex.join(([] if shown[0] == "efftrain" else ["python"]) + shown)


def _machine(made: Mapping[str, Any]) -> str:
    devices = list(made.get("devices") or ())
    kinds = ", ".join(f"{devices.count(kind)} x {plain(kind)}" for kind in dict.fromkeys(devices))
    cpu = f"{plain(made['cpu'])}, {made.get('cpu_cores')} cores" if made.get("cpu") else ""
    return "; ".join(filter(None, (kinds, cpu)))


def _curve(steps: Sequence[Row], evaluations: Sequence[Row]) -> str:
    """About ``POINTS`` steps, evenly spaced, and half as many evaluations; the first and the last of both."""
    losses = {row["step"]: row.get("loss") for row in steps}
    measure = next((m for m in ("bpb", "loss") if any(row.get(m) is not None for row in evaluations)), None)
    held_out = {row["step"]: row[measure] for row in evaluations if measure and row.get(measure) is not None}
    chosen = sorted({*_spread(list(losses), POINTS), *_spread(list(held_out), POINTS // 2)})
    heading = ["Step", "Training loss (nats/token)"]
    if measure:
        unit = "bits per byte" if measure == "bpb" else "nats/token"
        heading.append(f"Validation ({unit})")
    columns = (losses, held_out) if measure else (losses,)
    return table(heading, [[f"{step:,}", *(_number(values.get(step)) for values in columns)] for step in chosen])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _spread(values: Sequence[int], n: int) -> list[int]:
    """At most ``n`` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= n:
        return list(values)
    return [values[round(i * (len(values) - 1) / (n - 1))] for i in range(n)]


def scorecard(run: RunFacts) -> str:
    if run.scorecard is None:
        return "The run has no scorecard."
    measured = {name: figure for name, figure in run.scorecard.figures.items() if figure.value is not None}
    rows = [
        [code(name), show(figure), figure.method, plain("; ".join(filter(None, (_split(figure), figure.note))))]
        for name, figure in measured.items()
    ]
    text = table(["Figure", "Value", "Method", "Note"], rows)
    missing = [code(name) for name in run.scorecard.figures if name not in measured]
    machine = f"\n\nScored on {_machine(run.scorecard.environment)}." if run.scorecard.environment else ""
    return text + machine + (f" Not measured: {', '.join(missing)}." if missing else "")


def _split(figure: Figure) -> str:
    return f"{figure.split} split" if figure.split else ""


def compression(runs: list[RunFacts]) -> str:
    return "\n\n".join(_compressed(run) for run in reversed(runs) if run.compression is not None)


def _compressed(run: RunFacts) -> str:
    report, options = run.compression or {}, options_of(run)
    chosen = ", ".join(f"{name} {value}" for name, value in options.items() if _is_simple(name, value))
    rows = [["Method", f"{plain(options.get('type', 'not recorded'))}: {plain(chosen)}"]]
    matrices = report.get("matrices") or []
    formats: dict[str, int] = {}
    for matrix in matrices:
        why = f" ({matrix['why']})" if matrix.get("why") else ""
        name = f"{matrix.get('format')}{why}"
        formats[name] = formats.get(name, 0) + 1
    if formats:
        rows.append(["Matrices", plain("; ".join(f"{count} in {name}" for name, count in formats.items()))])
        sizes = [sum(matrix.get(name) or 0 for matrix in matrices) for name in ("bytes_before", "bytes_after")]
        rows.append(["Bytes of the matrices", _change(*(f"{size:,}" for size in sizes))])
    size = report.get("structured") or {}
    if size.get("before") and size.get("after"):
        for name, title in (("parameters", "Parameters"), ("bytes", "Bytes")):
            rows.append([title, _change(*(f"{size[side][name]:,}" for side in ("before", "after")))])
    if report.get("bpb_before") is not None and report.get("bpb") is not None:
        where = f" ({report.get('rows')} rows of the {plain(report.get('split'))} split)"
        rows.append(["Bits per byte", _change(_number(report["bpb_before"]), _number(report["bpb"])) + where])
    before = run.before.scorecard if run.before else None
    if run.scorecard and before and (both := _same_rows(before, run.scorecard)):
        rows.append(["Bits per byte", _change(*(_number(figure.value) for figure in both)) + f" ({_split(both[0])})"])
    return f"{code(run.name)} from {code(run.made_from)}:\n\n" + table(["", ""], rows)


def _is_simple(name: str, value: Any) -> bool:
    return name != "type" and value is not None and not isinstance(value, dict | list)


def _change(before: str, after: str) -> str:
    return f"{before} before, {after} after"


def _same_rows(before: Scorecard, after: Scorecard) -> tuple[Figure, Figure] | None:
    """The bits per byte of two models, if they were measured on the same rows."""
    first, second = before.figures.get("bpb"), after.figures.get("bpb")
    if first is None or second is None or first.value is None or second.value is None:
        return None
    return (first, second) if (first.split, first.note) == (second.split, second.note) else None


def options_of(run: RunFacts) -> dict[str, Any]:
    """Returns the options of the command that compressed a run; empty for other runs."""
    options = (run.compression or {}).get("options")
    return options if isinstance(options, dict) else {}
