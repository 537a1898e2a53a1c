"""Makes the plots of the report as plotly JSON. The page replaces colour names, for its light and dark mode."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from efftrain.data.dedup.lsh import collision_probability
from efftrain.data.report.scores import Histogram, number

RECALL_STEP = 0.05  # ``canary.check_recall`` counts a pair under its similarity, rounded down to a multiple of this


def expected_recall(similarity: float, bands: int, rows: int) -> float:
    """Returns the mean of the collision curve over the step that begins at ``similarity``."""
    return float(np.mean(collision_probability(np.linspace(similarity, _step_end(similarity), 51), bands, rows)))


def _step_end(similarity: float) -> float:
    return min(similarity + RECALL_STEP, 1.0)


def wilson_interval(found: int, pairs: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the Wilson interval of a share that was measured as ``found`` of ``pairs``.

    The default ``z`` gives the 95 % interval. Source: Wilson 1927.
    """
    if not pairs:
        return 0.0, 1.0
    share, spread = found / pairs, z * z / pairs
    centre = (share + spread / 2) / (1 + spread)
    half = z * (share * (1 - share) / pairs + spread / (4 * pairs)) ** 0.5 / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def collision_curve(near_duplicates: Mapping[str, Any]) -> dict[str, Any]:
    """Plots the expected recall of the configured bands, and the share of the planted pairs that was found."""
    bands, rows = near_duplicates["bands"], near_duplicates["rows"]
    x = np.linspace(0, 1, 201)
    curve = {
        "type": "scatter",
        "mode": "lines",
        "name": f"expected, {bands} bands of {rows}",
        "x": x.round(4).tolist(),
        "y": np.round(collision_probability(x, bands, rows), 5).tolist(),
        "line": {"color": "@kept", "width": 2},
        "hovertemplate": "similarity %{x:.2f}: %{y:.1%}<extra></extra>",
    }
    measured = [point for point in near_duplicates.get("recall") or () if point["pairs"]]
    shares = [point["found"] / point["pairs"] for point in measured]
    steps = [(point["similarity"], _step_end(point["similarity"])) for point in measured]
    spans = [wilson_interval(point["found"], point["pairs"]) for point in measured]
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "planted pairs found, 95 % interval",
        "x": [(low + high) / 2 for low, high in steps],
        "y": shares,
        "customdata": [[p["found"], p["pairs"], *step] for p, step in zip(measured, steps, strict=True)],
        "error_x": {
            "type": "data",
            "array": [(high - low) / 2 for low, high in steps],
            "color": "@rejected",
            "thickness": 1.5,
            "width": 0,
        },
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [high - share for share, (_, high) in zip(shares, spans, strict=True)],
            "arrayminus": [share - low for share, (low, _) in zip(shares, spans, strict=True)],
            "color": "@rejected",
            "thickness": 1.5,
            "width": 4,
        },
        "marker": {"color": "@rejected", "size": 8},
        "hovertemplate": "%{customdata[2]:.2f}–%{customdata[3]:.2f}: %{customdata[0]}/%{customdata[1]}<extra></extra>",
    }
    layout = _layout(
        height=380,
        xaxis={"title": {"text": "exact Jaccard similarity"}, "range": [0, 1.02]},
        yaxis={"title": {"text": "share of pairs compared"}, "range": [0, 1.05], "tickformat": ".0%"},
        lines=[near_duplicates["threshold"]],
    )
    layout |= {"showlegend": True, "legend": {"x": 0.02, "y": 0.98, "bgcolor": "rgba(0,0,0,0)"}}
    return {"data": [curve, points] if measured else [curve], "layout": layout}


def score_histogram(histogram: Histogram) -> dict[str, Any]:
    """Plots the number of documents by score, on a logarithmic axis because rejected documents are rare."""
    edges = histogram.edges
    scale = np.log10 if histogram.logarithmic else np.asarray  # the axis of plotly is linear in either case
    places = scale(edges)
    ends = (
        [end for end in histogram.interval.ends if end > 0 or not histogram.logarithmic] if histogram.interval else []
    )
    spans = [f"{number(a)} to {number(b)}" for a, b in pairwise(edges)]
    bars = [
        {
            "type": "bar",
            "x": _short((places[:-1] + places[1:]) / 2),
            "y": counts.tolist(),
            "width": _short(np.diff(places)),
            "marker": {"color": colour, "line": {"width": 0}},
            "customdata": spans,
            "hovertemplate": f"%{{customdata}}: %{{y:,}} {word}<extra></extra>",
        }
        for counts, colour, word in (
            (histogram.kept, "@kept", "kept"),
            (histogram.rejected, "@rejected", "rejected"),
        )
        if counts.any()
    ]
    most = int((histogram.kept + histogram.rejected).max(initial=1))
    margin = 0.02 * (places[-1] - places[0])
    xaxis: dict[str, Any] = {"range": [float(places[0] - margin), float(places[-1] + margin)], "nticks": 6}
    if histogram.logarithmic:
        powers = np.arange(np.ceil(places[0]), np.floor(places[-1]) + 1)
        xaxis |= {"tickvals": powers.tolist(), "ticktext": [number(10.0**power) for power in powers]}
    layout = _layout(
        height=190,
        xaxis=xaxis,
        yaxis={"type": "log", "range": [-0.15, float(np.log10(max(most, 2)) + 0.15)], "dtick": 1, "tickformat": ","},
        lines=scale(ends).tolist(),
    )
    # The two bars of a bin overlap, because stacked bars would be wrong on a logarithmic axis.
    return {"data": bars, "layout": layout | {"barmode": "overlay", "bargap": 0}}


def _layout(*, height: int, xaxis: dict, yaxis: dict, lines: Sequence[float]) -> dict[str, Any]:
    axis = {"gridcolor": "@grid", "zeroline": False, "linecolor": "@grid", "automargin": True, "fixedrange": True}
    return {
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 8, "b": 32},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "@text"},
        "showlegend": False,
        "xaxis": axis | xaxis,
        "yaxis": axis | yaxis,
        "shapes": [
            {
                "type": "line",
                "x0": x,
                "x1": x,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"color": "@text", "width": 1.5, "dash": "dash"},
            }
            for x in map(float, lines)
        ],
    }


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
