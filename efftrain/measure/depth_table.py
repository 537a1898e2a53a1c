"""A calibration of depth, for a person."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from efftrain.measure.calibrate_depth import QUALITY_LOSS, histogram_text
from efftrain.measure.exit_curves import RULES


def summary(values: Mapping[str, Any]) -> Iterator[Table]:
    """For a person: drafts, exits, and where the layers go."""
    if values.get("self_speculation"):
        best = values["self_speculation"]
        table = Table(
            "layers", "drafts", "accepted", "tokens/s", "plain", "ratio", "same tokens", title="self-speculation"
        )
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
        yield table
    if exits := values.get("confidence_exit"):
        seconds = values["seconds"]
        limit = f"{QUALITY_LOSS:.0%}"
        table = Table(
            "rule", "threshold", "layers", "bits/byte", "other tokens", "ms a token, 1 row", "8 rows",
            title=f"exit by confidence: the fewest layers at {limit} of quality", title_justify="left",
        )  # fmt: skip
        for rule, point in (("all layers", None), *((r, found["within_quality_loss"]) for r, found in exits.items())):
            point = point or exits[RULES[0]]["curve"][0]
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
    depths = values["confidence_exit"][rule]["within_quality_loss"] if rule else values["routed_depth"]
    title = f"depth by class of token, exit by {rule}" if rule else "depth by class of token"
    table = Table("to predict", "mean layers", "share of its tokens by layers", title=title, title_justify="left")
    for name, depth in depths["mean_depth_by_class"].items():
        table.add_row(name, f"{depth:.2f}", histogram_text(depths["histogram_by_class"][name]))
    yield table
