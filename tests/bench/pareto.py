"""Draws what techniques give: bits per byte against training FLOPs per token, each over its own dense baseline.

    python tests/bench/pareto.py            # writes tests/bench/results/pareto.svg
    python tests/bench/pareto.py --check    # changes nothing; fails where the picture differs from the result files

Every point is a model, placed by its cost and quality relative to the dense model of the same experiment and seed. All
experiments read the Python corpus, but not equally many tokens, and their dense models differ in size; so a point is
comparable with its baseline, and with other points only as a ratio. The bars span the seeds. The dashed line joins the
points that no other one beats in both quantities. The FLOPs of a teacher are not counted; "fresh text" is a baseline
that reads no row twice. A dagger is that of ``tables.py``. Techniques that save bytes and not FLOPs are in the tables.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from result_files import bpb, figure, read

FILE = Path(__file__).parent / "results" / "pareto.svg"
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 46, 54
X_RANGE, Y_RANGE = (0.5, 2.15), (-15.0, 10.0)
X_TICKS, Y_TICKS = (0.5, 0.7, 1.0, 1.4, 2.0), (-15, -10, -5, 0, 5, 10)

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #57606a }
  .axis { stroke: #57606a; stroke-opacity: .35 }
  .bar { stroke-width: 1.5 }
  .equal { fill: #0969da; stroke: #0969da }
  .added { fill: #bc4c00; stroke: #bc4c00 }
  .base { fill: #57606a; stroke: #57606a }
  .front { fill: none; stroke: #1a7f37; stroke-width: 1.5; stroke-dasharray: 5 4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #aab4be }
    .axis { stroke: #aab4be }
    .equal { fill: #58a6ff; stroke: #58a6ff }
    .added { fill: #f0883e; stroke: #f0883e }
    .base { fill: #aab4be; stroke: #aab4be }
    .front { stroke: #56d364 }
  }
"""


@dataclass(frozen=True)
class Point:
    """A model relative to its dense baseline.

    Attributes:
      flops: training FLOPs per token over those of the baseline.
      excess: bits per byte above the baseline's in percent, for each seed.
      kind: "equal" if it had the training FLOPs or tokens of its baseline, "added" if it was trained for longer.
      label: beside the point; the offset in pixels keeps labels apart.
    """

    label: str
    flops: float
    excess: Sequence[float]
    kind: str
    offset: tuple[float, float] = (9, 4)
    anchor: str = "start"


def excess(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [100 * (value / of - 1) for value, of in zip(values, base, strict=True)]


def compared(label: str, result: str, variant: str, base: str, kind: str = "equal", **place) -> Point:
    ratio = figure(result, variant, "train_flops_per_token") / figure(result, base, "train_flops_per_token")
    return Point(label, ratio, excess(bpb(result, variant), bpb(result, base)), kind, **place)


def cut(label: str, key: str, **place) -> Point:
    """A model that was cut out of a dense one and trained on a tenth more tokens, in one round."""
    seeds = list(read("prune_quality")["seeds"].values())
    whole = seeds[0]["tuned"]["magnitude"]["train_flops"]  # as many tokens in the shape of the dense model
    base = [seed["at_once"]["dense"] for seed in seeds]
    tuned = [seed["tuned"][key] for seed in seeds]
    return Point(label, tuned[0]["train_flops"] / whole, excess([t["bpb"] for t in tuned], base), "added", **place)


def points() -> list[Point]:
    width = cut("width cut by a third†", "width33", offset=(9, -6))
    recovery = read("distill_quality")["recovery"]
    healed = excess(list(recovery["bpb"].values()), list(recovery["dense"].values()))
    long = read("distill_quality")["2000_steps"]["bpb"]
    mixture = "adaptive_depth_mixture"
    return [
        compared("mixture of experts", "moe_quality", "moe", "dense", offset=(9, 0)),
        compared(
            "dense, twice as wide", "moe_quality", "dense-wide", "dense", kind="base", offset=(-9, -8), anchor="end"
        ),
        compared("mixture of depths", mixture, "mixture-of-depths", "plain", offset=(-9, 4), anchor="end"),
        compared("recursion (one seed)", "adaptive_depth_recursion", "recursion", "plain", offset=(-30, 17)),
        Point("distillation", 1.0, excess(long["samples"], long["text"]), "equal"),
        Point(
            "distillation, over fresh text", 1.0, excess(long["samples"], long["text-fresh"]), "equal", offset=(9, 10)
        ),
        width,
        Point("the same, distilled†", width.flops, healed, "added", offset=(9, 12)),
        cut("2 of 6 layers cut†", "depth28", offset=(-9, -6), anchor="end"),
    ]


def front(found: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in FLOPs and in bits, by falling bits."""
    best, kept = math.inf, []
    for point in sorted(found, key=lambda p: (p.flops, fmean(p.excess))):
        if fmean(point.excess) < best:
            best = fmean(point.excess)
            kept.append(point)
    return kept


def x_of(flops: float) -> float:
    low, high = map(math.log, X_RANGE)
    return LEFT + (math.log(flops) - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def y_of(percent: float) -> float:
    low, high = Y_RANGE
    return TOP + (high - percent) / (high - low) * (HEIGHT - TOP - BOTTOM)


def text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def draw() -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f"<style>{STYLE}</style>"]
    for tick in X_TICKS:
        parts += [line(x_of(tick), bottom, x_of(tick), bottom + 5, "axis")]
        parts += [text(x_of(tick), bottom + 19, f"{tick:g}", "middle")]
    for tick in Y_TICKS:
        parts += [line(LEFT, y_of(tick), right, y_of(tick), "axis")]
        parts += [text(LEFT - 8, y_of(tick) + 4, f"{tick:+d} %" if tick else "0", "end")]
    parts += [line(x_of(1), TOP, x_of(1), bottom, "axis")]
    parts += [
        text((LEFT + right) / 2, HEIGHT - 14, "training FLOPs per token, over those of the dense baseline", "middle")
    ]
    parts += [text(8, 18, "bits per byte, over the dense baseline of the same experiment (lower is better)")]
    for x, kind, words in ((372, "equal", "equal training FLOPs or equal tokens"), (634, "added", "10 % more tokens")):
        parts += [f'<circle class="{kind}" cx="{x}" cy="33" r="4"/>', text(x + 8, 37, words)]
    found = points()
    base = Point("dense baseline", 1.0, [0.0], "base", offset=(9, -6))
    stairs = front([*found, base])
    path = "M" + " L".join(f"{x_of(p.flops):.1f} {y_of(fmean(p.excess)):.1f}" for p in stairs)
    parts.append(f'<path class="front" d="{path}"/>')
    for point in [base, *found]:
        x, y = x_of(point.flops), y_of(fmean(point.excess))
        parts.append(line(x, y_of(min(point.excess)), x, y_of(max(point.excess)), f"bar {point.kind}"))
        parts.append(f'<circle class="{point.kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
        parts.append(text(x + point.offset[0], y + point.offset[1], point.label, point.anchor))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">'
    title = "<title>Bits per byte against training FLOPs per token, relative to dense baselines</title>"
    return "\n".join([head, title, *parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with code 1 where the picture differs"
    )
    if parser.parse_args().check:
        if FILE.read_text() != draw():
            sys.exit(f"{FILE.name} differs from its result files; run: python tests/bench/pareto.py")
    else:
        FILE.write_text(draw())


if __name__ == "__main__":
    main()
