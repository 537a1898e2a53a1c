"""How fast texts become MinHash signatures, beside datasketch, rensa and datatrove, and signatures clusters.

    python -m venv peers && peers/bin/pip install datasketch rensa datatrove regex 'xxhash<4' tokenizers
    python tests/bench/curation.py --peer-python peers/bin/python

The last line is JSON. Goals: 15 times datasketch's bulk with its default hash, once rensa with shingles made in Python,
5 times datatrove's signature stage, on the same documents, one core each, in turn; the rules at 5 MB/s; 10 million
documents are grouped in less than 4 GB (extrapolated). Speed is per second of processor time, so that neighbours on the
machine count little. The peers' word splitter is the plain one of ``peer_shingles``: it is faster than the language
models that datatrove loads by default.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GOALS = {"datasketch": 15.0, "rensa": 1.0, "datatrove": 5.0}
GOAL_GROUPING_GB = 4.0
N_PERMUTATIONS, BANDS, SHINGLE = 112, 16, 5  # the same work for all, whatever becomes of the defaults
BATCH_BYTES = 512 << 10


@dataclass(frozen=True, kw_only=True)
class Config:
    """The curation benchmark.

    Attributes:
      peer_python: an interpreter that has datasketch, rensa and datatrove; without one no ratio is measured.
      documents: how many synthetic documents are signed in each round.
      words: of each of them.
      rounds: the median of so many is reported.
      group_documents: synthetic documents whose signatures are grouped; the last two give the extrapolation.
      rules: also measure the quality rules.
    """

    peer_python: Path | None = None
    documents: int = 2000
    words: int = 500
    rounds: int = 5
    group_documents: tuple[int, ...] = (1_000_000, 2_000_000)
    rules: bool = True


def main(config: Config) -> None:
    machine = f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, Python {platform.python_version()}, NumPy {np.__version__}")
    result = signature_speed(config) | grouping(config.group_documents)
    if config.rules:
        from rules import rule_speed  # beside this file

        result["rules"] = rule_speed()
        print(f"rules: {result['rules']['mb_per_s']} MB/s")
    print(json.dumps(result))


def documents(n: int, words: int, seed: int = 0) -> list[bytes]:
    """English-like texts: 50,000 words of 2 to 14 letters, drawn by Zipf's law, with capitals and punctuation."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkxqjz", np.uint8)
    weights = 1 / np.arange(2, 28)
    lengths = np.clip(rng.poisson(4.5, 50_000) + 2, 2, 14)
    vocabulary = [rng.choice(letters, size, p=weights / weights.sum()).tobytes() for size in lengths]
    ranks = 1 / np.arange(10, 50_010)
    texts = []
    for _ in range(n):
        chosen = rng.choice(50_000, words, p=ranks / ranks.sum())
        sentences = [b" ".join(vocabulary[i] for i in chosen[start : start + 12]) for start in range(0, words, 12)]
        texts.append(b". ".join(sentence.capitalize() for sentence in sentences) + b".\n")
    return texts


def signature_speed(config: Config) -> dict:
    """Text in, signatures out: MB of text per second and core, ours and the peers' in turn."""
    texts = documents(config.documents, config.words)
    megabytes = sum(map(len, texts)) / 1e6
    seconds = {"efftrain": []} | ({name: [] for name in PEERS} if config.peer_python else {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.json"
        path.write_text(json.dumps([text.decode() for text in texts]))
        peers = Peers(config.peer_python, path) if config.peer_python else None
        for number in range(config.rounds + 1):  # the first warms caches up
            for name, found in seconds.items():
                took = _own_seconds(texts) if name == "efftrain" else peers.seconds(name)
                if number:
                    found.append(took)
                    print(f"round {number}: {name} {megabytes / took:.1f} MB/s")
        if peers:
            peers.close()
    speeds = {name: megabytes / statistics.median(found) for name, found in seconds.items()}
    return {
        "signature_mb_per_s": {name: round(speed, 2) for name, speed in speeds.items()},
        "signature_rounds": {name: [round(megabytes / s, 1) for s in found] for name, found in seconds.items()},
        "ratios": {
            name: {"ratio": round(speeds["efftrain"] / speeds[name], 2), "goal": GOALS[name]}
            for name in speeds
            if name != "efftrain"
        },
        "documents": len(texts),
        "megabytes": round(megabytes, 2),
    }


def _own_seconds(texts: list[bytes]) -> float:
    from efftrain.data.batching import by_size
    from efftrain.data.dedup.minhash import MinHash, document_hashes, signatures

    config = MinHash(n_permutations=N_PERMUTATIONS, bands=BANDS, shingle=SHINGLE)

    def run() -> None:
        for batch in by_size(texts, BATCH_BYTES):
            signatures(*document_hashes(batch, config), config)

    return _seconds(run)


def _seconds(run: Callable[[], object]) -> float:
    """Of processor time for one call; calls are repeated for a second, so that waking up counts little for the fast."""
    started, n = time.process_time(), 0
    while not n or time.process_time() - started < 1:
        run()
        n += 1
    return (time.process_time() - started) / n


class Peers:
    """A process of another interpreter that runs one peer when asked for, and waits meanwhile."""

    def __init__(self, python: Path, texts: Path):
        # One thread each: the figures are per core.
        environment = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [str(python), __file__, "--serve", str(texts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def seconds(self, name: str) -> float:
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{name} failed in the peer process; its message is above")
        return float(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve(path: Path) -> None:
    """Runs in the peers' interpreter, which has no efftrain: a name comes in, seconds of processor time go out."""
    texts = json.loads(path.read_text())
    ready = {}
    for name in map(str.strip, sys.stdin):
        if name not in ready:
            ready[name] = PEERS[name]()
        given = texts if name == "datatrove" else [text.encode() for text in texts]
        print(_seconds(lambda run=ready[name], given=given: run(given)), flush=True)


def peer_shingles(text: bytes) -> list[bytes]:
    """The same shingles as ours for ASCII, by the fastest plain Python we know."""
    words = text.translate(_NORMAL).split()
    return list(map(b" ".join, zip(*(words[i:] for i in range(SHINGLE)), strict=False)))


_NORMAL = bytes(ord(chr(c).lower()) if c < 128 and chr(c).isalnum() else c if c >= 128 else 0x20 for c in range(256))


def _datasketch() -> Callable[[list[bytes]], object]:
    from datasketch import MinHash

    return lambda texts: MinHash.bulk(map(peer_shingles, texts), num_perm=N_PERMUTATIONS)


def _rensa() -> Callable[[list[bytes]], object]:
    from rensa import RMinHash

    def run(texts):
        return RMinHash.digest_matrix_from_token_byte_sets([peer_shingles(t) for t in texts], N_PERMUTATIONS, 1)

    return run


def _datatrove() -> Callable[[list[str]], object]:
    import re

    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Plain(WordTokenizer):
        """Whitespace and punctuation; the default needs a language model."""

        def word_tokenize(self, text):
            return re.findall(r"\w+", text)

        def sent_tokenize(self, text):
            return [text]

        def span_tokenize(self, text):
            return [(0, len(text))]

    config = MinhashConfig(n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=N_PERMUTATIONS // BANDS)
    stage = MinhashDedupSignature(tempfile.mkdtemp(), config, language=Plain())
    return lambda texts: [stage.get_signature(stage.get_shingles(text)) for text in texts]


PEERS = {"datasketch": _datasketch, "rensa": _rensa, "datatrove": _datatrove}


def grouping(sizes: tuple[int, ...]) -> dict:
    """Bands, buckets and components of synthetic signatures, each size in a process of its own for its peak memory."""
    measured = []
    for size in sizes:
        command = [sys.executable, __file__, "--group", str(size)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        measured.append(json.loads(output.splitlines()[-1]))
        print(f"grouping: {measured[-1]}")
    result = {"grouping": measured}
    if len(measured) > 1:
        small, large = measured[-2:]
        per_document = (large["peak_mb"] - small["peak_mb"]) / (large["documents"] - small["documents"])
        gigabytes = (large["peak_mb"] + per_document * (10_000_000 - large["documents"])) / 1000
        result["ten_million_gb_extrapolated"] = round(gigabytes, 2)
        result["ten_million_under_4_gb"] = gigabytes < GOAL_GROUPING_GB
    return result


def group(n: int) -> dict:
    """Groups n synthetic signatures, one in ten a near duplicate, by way of files as the pipeline does."""
    from efftrain.data.dedup.lsh import band_edges, band_hashes, components

    rng = np.random.default_rng(0)
    hashing = sorting = joining = 0.0
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(band) for band in range(BANDS)]
        for start in range(0, n, 50_000):
            size = min(50_000, n - start)
            signatures = rng.integers(0, 1 << 32, (size, N_PERMUTATIONS), dtype=np.uint32)
            copies = np.arange(9, size, 10)
            changed = rng.random((len(copies), N_PERMUTATIONS)) < 0.1
            signatures[copies] = np.where(changed, signatures[copies], signatures[copies - 5])
            began = time.process_time()
            hashes = band_hashes(signatures, BANDS)
            hashing += time.process_time() - began
            for path, of_band in zip(paths, hashes, strict=True):
                with path.open("ab") as file:
                    file.write(of_band.tobytes())
        edges, members = np.empty((0, 2), np.int64), np.empty(0, np.int64)
        for path in paths:
            began = time.process_time()
            more, _ = band_edges(np.fromfile(path, np.uint64), np.arange(n), 10_000)
            sorting += time.process_time() - began
            began = time.process_time()
            members, labels = components(np.concatenate([edges, more]))
            edges = np.stack([members, labels], axis=1)[members != labels]
            joining += time.process_time() - began
    seconds = {"band_hashes": hashing, "sort_and_edges": sorting, "components": joining}
    return {
        "documents": n,
        "seconds": round(hashing + sorting + joining, 2),
        "of_which": {name: round(value, 2) for name, value in seconds.items()},
        "candidates": len(members),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve", path]:
            serve(Path(path))
        case ["--group", size]:
            print(json.dumps(group(int(size))))
        case _:
            import tyro

            main(tyro.cli(Config, description=__doc__))
