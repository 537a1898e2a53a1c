"""Which planted near duplicates are found and which texts are wrongly removed, beside datatrove and datasketch.

    python -m venv peers && peers/bin/pip install datatrove datasketch spacy
    git worktree add base COMMIT
    python tests/bench/near_duplicates.py --peer-python peers/bin/python --base base

Pairs of texts are made from a seed: prose of Python's manual with words edited until the exact Jaccard similarity of
word 5-grams is in a band of 0.05; pairs that are no duplicates (boilerplate, templates); texts that a reader would call
the same in other characters; edited texts of several scripts. Each pair goes through signing, banding and exact
verification as in a build. datatrove runs with its default configuration, datasketch as an index of threshold .75 and
128 permutations on words split at spaces; neither verifies. ``--base`` runs the same pairs on another checkout.

The last line is JSON: ``rates`` (found, in percent), ``mb_per_s`` of hashing by script, ``ratio``, the lowest rate of a
band from .75 on, relative to the base's where one is given, and ``goal``. The goals: no band below the base's, the
cases of ``SAME`` found, no pair of ``DIFFERENT`` removed.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from planted_pairs import BANDS, DIFFERENT, SAME, SHINGLE, corpora, planted  # beside this file

THRESHOLD = 0.75
GOAL_RATIO, GOAL_SAME = 1.0, 100


@dataclass(frozen=True, kw_only=True)
class Config:
    """The benchmark of near duplicates.

    Attributes:
      peer_python: an interpreter that has datatrove and datasketch; without one no peer is measured.
      base: a checkout of efftrain to compare with.
      pairs: of each band and case.
      seed: of all texts.
    """

    peer_python: Path | None = None
    base: Path | None = None
    pairs: int = 50
    seed: int = 0


def main(config: Config) -> None:
    machine = f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, Python {platform.python_version()}, NumPy {np.__version__}")
    pairs = planted(config.pairs, config.seed)
    runs = {"efftrain": (sys.executable, "--own", Path(__file__).parents[2])}
    if config.base:
        runs["base"] = (sys.executable, "--own", config.base.resolve())
    if config.peer_python:
        runs |= {name: (str(config.peer_python), f"--{name}", None) for name in ("datatrove", "datasketch")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.json"
        path.write_text(json.dumps({"pairs": pairs, "speed": corpora(config.seed)}))
        answers = {name: _answer(*run, path) for name, run in runs.items()}
    rates = {
        case: {name: round(100 * float(np.mean(answer["found"][case]))) for name, answer in answers.items()}
        for case in pairs
    }
    print(f"\n| {'case':44s} | " + " | ".join(answers) + " |\n|---|" + "---|" * len(answers))
    for case, row in rates.items():
        print(f"| {case:44s} | " + " | ".join(f"{rate:{len(name)}d}" for name, rate in row.items()) + " |")
    speeds = {name: answer["mb_per_s"] for name, answer in answers.items() if "mb_per_s" in answer}
    print(f"\nMB/s of hashing: {speeds}")
    measured = {
        "bench": "near_duplicates",
        "machine": machine,
        "pairs": config.pairs,
        "rates": rates,
        "mb_per_s": speeds,
    }
    print(json.dumps(measured | judged(rates)))


def judged(rates: dict[str, dict[str, int]]) -> dict:
    """The goals and what was reached."""
    high = [rates[f"J .{low:02d}-"] for low in BANDS if low >= 100 * THRESHOLD]
    ratio = min(row["efftrain"] / max(row.get("base", 100), 1) for row in high)
    same = min(rates[case]["efftrain"] for case in SAME)
    removed = max(rates[case]["efftrain"] for case in DIFFERENT)
    return {
        "ratio": round(ratio, 3),
        "goal": GOAL_RATIO,
        "same_found": same,
        "same_goal": GOAL_SAME,
        "different_removed": removed,
        "different_goal": 0,
        "met": ratio >= GOAL_RATIO and same >= GOAL_SAME and removed == 0,
    }


def _answer(python: str, mode: str, tree: Path | None, pairs: Path) -> dict:
    environment = os.environ | ({"PYTHONPATH": str(tree)} if tree else {})
    command = [python, __file__, mode, str(pairs)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


# What runs in a process of its own.


def own(given: dict) -> dict:
    """Signing, banding and verification of the efftrain that this process imports."""
    from efftrain.data.dedup.lsh import band_hashes
    from efftrain.data.dedup.minhash import MinHash
    from efftrain.data.dedup.near_duplicates import sign
    from efftrain.data.dedup.shingles import shingle_hashes, shingle_set
    from efftrain.data.dedup.verify import leaders

    config = MinHash()

    def is_found(pair: tuple[str, str]) -> bool:
        texts = [text.encode() for text in pair]
        signed = sign(texts, config)
        bands = band_hashes(signed, config.bands)
        if not (bands[:, 0] == bands[:, 1]).any():
            return False
        return bool(leaders(np.arange(2), signed, lambda i: shingle_set(texts[i], config.shingle), config))

    speeds = {}
    for name, corpus in given["speed"].items():
        texts, seconds = [text.encode() for text in corpus], []
        for _ in range(20):
            began = time.process_time()
            shingle_hashes(texts)
            seconds.append(time.process_time() - began)
        speeds[name] = round(sum(map(len, texts)) / 1e6 / min(seconds), 1)
    return {"found": _ask(is_found, given["pairs"]), "mb_per_s": speeds}


def datatrove(given: dict) -> dict:
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

    stage = MinhashDedupSignature(tempfile.mkdtemp())

    def is_found(pair: tuple[str, str]) -> bool:
        shingles = [stage.get_shingles(text) for text in pair]
        if not all(map(len, shingles)):
            return False
        return any(a == b for a, b in zip(*map(stage.get_signature, shingles), strict=True))

    return {"found": _ask(is_found, given["pairs"])}


def datasketch(given: dict) -> dict:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=128)  # how it would cut signatures into bands

    def sketch(text: str) -> MinHash:
        words = text.split()
        shingles = [" ".join(words[i : i + SHINGLE]).encode() for i in range(max(len(words) - SHINGLE + 1, 1))]
        result = MinHash(num_perm=128)
        result.update_batch(shingles)
        return result

    def is_found(pair: tuple[str, str]) -> bool:
        bands = [sketch(text).hashvalues[: index.b * index.r].reshape(index.b, index.r) for text in pair]
        return bool((bands[0] == bands[1]).all(axis=1).any())

    return {"found": _ask(is_found, given["pairs"])}


def _ask(is_found: Callable[[tuple[str, str]], bool], pairs: dict[str, list[tuple[str, str]]]) -> dict[str, list[bool]]:
    return {case: [bool(is_found(tuple(pair))) for pair in of_case] for case, of_case in pairs.items()}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--own" | "--datatrove" | "--datasketch" as mode, path]:
            print(json.dumps(globals()[mode[2:]](json.loads(Path(path).read_text()))))
        case _:
            import tyro

            main(tyro.cli(Config, description=__doc__))
