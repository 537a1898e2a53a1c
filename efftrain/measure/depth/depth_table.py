"""Tables of a depth calibration for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from efftrain.measure.depth.calibrate_depth import QUALITY_LOSS
from efftrain.measure.depth.depth_report import histogram_text
from efftrain.measure.depth.exit_curves import RULES


def summary(values: Mapping[str, Any]) -> Iterator[Table]:
    """Yields the tables of a calibration: self-speculation, early exits, and depths by class of token.

    Args:
      values: content of ``depth.json``.
    """
    report = values["report"]
    of = f"{report['split']} split, {report['rows']} rows" + (f"; {report['note']}" if report["note"] else "")
    if values.get("self_speculation"):
        best = values["self_speculation"]
        table = Table(
            "layers", "drafts", "accepted", "tokens/s", "plain", "ratio", "same tokens",
            title=f"self-speculation, chosen on the {values['chosen_on']['split']} split", title_justify="left",
        )  # fmt: skip
        for cell in sorted(values["self_speculation"]["grid"], key=lambda cell: -cell["speedup"])[:8]:
            chosen = (cell["exit_layer"], cell["n_draft"]) == (best["exit_layer"], best["n_draft"])
            table.add_row(
                str(cell["exit_layer"]),
                str(cell["n_draft"]),
                f"{cell['acceptance']:.0%}",
                f"{cell['tokens_per_s']:,.0f}",
                f"{cell['plain_tokens_per_s']:,.0f}",
                f"{cell['speedup']:.2f}",
                "yes" if cell["identical"] else "no",
                style="bold" if chosen else "",
            )
        if (drafts := report["self_speculation"]) is not None:
            table.caption = f"{of}: {drafts['speedup']:.2f} times as fast as plain decoding"
        yield table
    if exits := report.get("confidence_exit"):
        seconds = values["seconds"]
        limit = f"{QUALITY_LOSS:.0%}"
        table = Table(
            "rule", "threshold", "layers", "bits/byte", "other tokens", "ms per token, 1 row", "8 rows",
            title=f"exit by confidence: the fewest layers at {limit} of quality, on the {of}", title_justify="left",
        )  # fmt: skip
        points = {"all layers": exits[RULES[0]]["all layers"]}
        for rule, point in (points | {r: found["within_quality_loss"] for r, found in exits.items()}).items():
            ms = [f"{1e3 * row[rule]['s_per_token']:.2f}" for row in seconds.values()]
            table.add_row(
                rule,
                "-" if rule == "all layers" else f"{point['threshold']:.4f}",
                f"{point['mean_depth']:.2f}",
                f"{point['bpb']:.4f}",
                f"{point['differs']:.1%}",
                *ms,
            )
        yield table
    rule = values.get("chosen_rule")
    depths = report["confidence_exit"][rule]["within_quality_loss"] if rule else values["routed_depth"]
    title = f"depth by class of token, exit by {rule}" if rule else f"depth by class of token, on the {of}"
    table = Table("to predict", "mean layers", "share of its tokens by layers", title=title, title_justify="left")
    for name, depth in depths["mean_depth_by_class"].items():
        table.add_row(name, f"{depth:.2f}", histogram_text(depths["histogram_by_class"][name]))
    yield table
