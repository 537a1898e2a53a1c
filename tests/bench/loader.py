"""Packed tokens per second and core from ArrayRecord, and the peak memory of a corpus build as the corpus grows.

    python tests/bench/loader.py                                # builds a synthetic corpus to read from
    python tests/bench/loader.py --corpus corpora/python        # reads an existing one
    python tests/bench/loader.py --sizes-mb 50 200 800

The last line is JSON. Goals: the loader gives at least 20 times what a model consumes, per core; a build stays under
2 GB whatever the size of the corpus.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from efftrain import data
from efftrain.data.documents import Document

GOAL_TIMES = 20
GOAL_PEAK_MB = 2000
PIECE = 1600  # documents that a worker makes at a time: 16 MB


@dataclass(frozen=True, kw_only=True)
class Config:
    """The loader benchmark.

    Attributes:
      corpus: an existing corpus to read; by default the largest synthetic one.
      length: tokens per row.
      batch_size: rows per batch.
      consumption: tokens per second that the quickstart model trains on; the goal is 20 times this per core.
      rounds: the median of so many is reported.
      seconds: length of a round.
      sizes_mb: sizes of the synthetic corpora whose build is measured.
      build_folder: for internal use: build one corpus here and stop.
    """

    corpus: Path | None = None
    length: int = 256
    batch_size: int = 16
    consumption: float = 10_000.0
    rounds: int = 5
    seconds: float = 2.0
    sizes_mb: tuple[int, ...] = (50, 200)
    build_folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Synthetic(data.FileSource):
    """Documents of about 10 kB: lines of Python that are dealt anew for each, one in ten a repeat of an earlier one."""

    megabytes: int

    def files(self):
        yield "argparse.py", Path(os.__file__).with_name("argparse.py")

    def pieces(self):
        n_documents = self.megabytes * 100
        for start in range(0, n_documents, PIECE):
            yield data.Piece(tuple(self.files()), start, min(start + PIECE, n_documents))

    def documents(self, piece):
        import random

        lines = Path(os.__file__).with_name("argparse.py").read_text().splitlines()
        for number in range(piece.start, piece.stop):
            rng = random.Random(number - 5 if number % 10 == 9 else number)
            text = "\n".join(f"{line}  # {rng.randrange(10**6)}" for line in rng.choices(lines, k=215))
            yield Document(f"doc{number}", text, "synthetic", {"group": f"group{number % 500}"})


def main(config: Config) -> None:
    if config.build_folder:
        source = Synthetic(megabytes=config.sizes_mb[0])
        data.build(data.CorpusConfig(sources=(source,), rules=(data.Code(),)), config.build_folder)
        return
    machine = f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        builds = [measure_build(Path(folder), size) for size in config.sizes_mb]
        corpus = config.corpus or Path(folder) / f"{config.sizes_mb[-1]}"
        rounds = measure_loader(config, corpus)
    median = statistics.median(rounds)
    ratio = median / (GOAL_TIMES * config.consumption)
    peaks = [build["peak_mb"] for build in builds]
    result = {
        "tokens_per_second_per_core": round(median),
        "rounds": [round(r) for r in rounds],
        "length": config.length,
        "consumption": config.consumption,
        "builds": builds,
        "peak_mb": max(peaks),
        "peak_under_2_gb": max(peaks) < GOAL_PEAK_MB,
        "ratio": round(ratio, 2),
        "goal": 1.0,
    }
    print(json.dumps(result))


def measure_loader(config: Config, corpus: Path) -> list[float]:
    """Tokens per second of CPU time, one figure a round; the processor's time is what the trainer cannot use."""
    loader = data.batches(
        data.LoaderConfig(corpora=(data.Part(path=corpus),), length=config.length, batch_size=config.batch_size)
    )
    for _ in range(20):
        next(loader)
    rates = []
    for number in range(config.rounds):
        n_tokens, started, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - started < config.seconds:
            n_tokens += next(loader)["tokens"].size
        rates.append(n_tokens / (time.process_time() - cpu))
        print(f"round {number + 1}: {rates[-1]:,.0f} tokens per second and core")
    return rates


def measure_build(folder: Path, megabytes: int) -> dict[str, float]:
    """Builds a synthetic corpus in a process of its own and watches the memory of it and of its workers."""
    out = folder / f"{megabytes}"
    started, peak = time.perf_counter(), 0
    command = [sys.executable, __file__, "--build-folder", out, "--sizes-mb", megabytes]
    process = subprocess.Popen([str(part) for part in command])
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            processes = [watched, *watched.children(recursive=True)]
            peak = max(peak, sum(process.memory_info().rss for process in processes))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"the build of {megabytes} MB failed")
    result = {"mb": megabytes, "peak_mb": round(peak / 1e6), "seconds": round(time.perf_counter() - started, 1)}
    print(f"build of {megabytes} MB: peak {result['peak_mb']} MB, {result['seconds']} s")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
