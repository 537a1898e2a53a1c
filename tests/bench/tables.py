"""Writes the measured tables of the guides from the result files, so that no figure is copied by hand.

    python tests/bench/tables.py            # rewrites the tables in README.md and in the guides
    python tests/bench/tables.py --check    # changes nothing; fails where a guide differs from its result files

A generated part of a guide is everything between ``<!-- table: NAME -->`` and ``<!-- end -->``. NAME is a function of
``training_tables``, ``compression_tables`` or ``overview_tables``, which read ``tests/bench/results/*.json``.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import compression_tables as compression
import overview_tables as overview
import training_tables as training

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md")), *sorted(ROOT.glob("tests/bench/*.md"))]
PART = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)

TABLES = {
    table.__name__: table
    for table in (
        *(training.moe_quality, training.moe_clock),
        *(training.adaptive_quality, training.speculation, training.routed_decoding, training.exits),
        *(compression.quantize_quality, compression.quantize_decoding, compression.quantize_products),
        *(compression.quantize_memory, compression.quantize_conversion),
        *(compression.prune_quality, compression.prune_latency, compression.prune_clock),
        *(compression.distill_quality, compression.distill_starts, compression.distill_recovery),
        *(compression.distill_clock, compression.task_distill),
        *(overview.techniques, overview.speed, overview.near_duplicates),
    )
}

CALIBRATION = "calibration counted padding and filler rows, and did not limit massive activations"
GPTQ = f"GPTQ did not clip weights; {CALIBRATION}"
COPIES = "decoding copied the stacked layers in every call"
EXITS = f"the risk of exits was one over rows instead of documents; {COPIES}"
NO_CLIPS = f"AWQ did not look at the outputs of blocks, and did not clip weights; {CALIBRATION}"
CONVERSION = f"seconds beside other work; {GPTQ}"

# Rows that rest on a fault that was mended since, and that were not measured again: table -> first cell -> fault. Their
# names get a dagger. Whoever measures a row again deletes it here.
DAGGERS = {
    "techniques": {
        "[Self-speculation](recipes/adaptive-depth.md)": COPIES,
        "[Early exits](recipes/adaptive-depth.md)": EXITS,
        "[4 bits, GPTQ](recipes/quantization.md)": GPTQ,
        "[8 bits, both sides](recipes/quantization.md)": COPIES,
        "[Structured pruning](recipes/pruning.md)": CALIBRATION,
    },
    "speed": {"self-speculation, 8 layers, d=128, batch 1, head included": COPIES},
    "speculation": {"times as fast as plain decoding": COPIES, "share of the drafts accepted": COPIES},
    "routed_decoding": {"plain": COPIES, "mixture of depths": COPIES, "recursion": COPIES},
    "exits": {
        "all layers": COPIES,
        "exit by similarity": EXITS,
        "exit by gap": EXITS,
        "exit by probe": EXITS,
    },
    "quantize_quality": {"int4:g32, AWQ without clips": NO_CLIPS, "int4:g32, GPTQ": GPTQ},
    "quantize_decoding": {
        "float32": COPIES,
        "bfloat16": COPIES,
        "int8": COPIES,
        "int8, int8 activations": COPIES,
        "int4:g32": COPIES,
    },
    "quantize_conversion": {
        "rounding": CONVERSION,
        "GPTQ": CONVERSION,
        "AWQ": NO_CLIPS,
    },
    "prune_quality": {
        "50 % at once, Wanda": CALIBRATION,
        "50 % at once, SparseGPT": CALIBRATION,
        "2:4 at once, Wanda": CALIBRATION,
        "2:4 at once, SparseGPT": CALIBRATION,
        "cut in width": CALIBRATION,
        "cut in depth, 4 of 6 layers": CALIBRATION,
        "cut in width, two rounds": CALIBRATION,
    },
    "prune_clock": {
        "100M parameters at once, magnitude": CALIBRATION,
        "100M parameters at once, Wanda": CALIBRATION,
        "100M parameters at once, SparseGPT": CALIBRATION,
    },
    "distill_recovery": {"with `--distill`": CALIBRATION, "without": CALIBRATION},
}


def part(name: str) -> str:
    """Returns a generated part, with its daggers; RESULTS is still to be replaced by the path of the results."""
    text = TABLES[name]()
    for row in DAGGERS.get(name, ()):
        if text.count(f"\n| {row} |") != 1:
            raise ValueError(f"the table {name} has no row {row!r} that could get a dagger; mend DAGGERS")
        text = text.replace(f"\n| {row} |", f"\n| {row}† |")
    return text


def generate(guide: Path) -> str:
    """Returns the text of a guide with every generated part made anew from the result files."""
    results = os.path.relpath(ROOT / "tests" / "bench" / "results", guide.parent)

    def replace(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"{guide.relative_to(ROOT)}: there is no table {name}; choose one of {', '.join(TABLES)}")
        return f"{begin}{part(name).replace('RESULTS/', f'{results}/')}\n{end}"

    return PART.sub(replace, guide.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with code 1 where a guide differs")
    check = parser.parse_args().check
    new = {guide: generate(guide) for guide in GUIDES}
    differing = [guide for guide in GUIDES if new[guide] != guide.read_text()]
    for guide in differing:
        print(f"{guide.relative_to(ROOT)}: {'differs from its result files' if check else 'rewritten'}")
        if not check:
            guide.write_text(new[guide])
    if check and differing:
        sys.exit("run: python tests/bench/tables.py")


if __name__ == "__main__":
    main()
