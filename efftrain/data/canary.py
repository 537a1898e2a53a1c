"""Planted near duplicates: does this run of the deduplication find what it should?

Copies of documents of the corpus, with a block of words replaced so that their similarity is known, go through signing,
banding and verification like any other document. They are never part of the corpus and decide nothing in it.
"""

from typing import Any

import numpy as np

from efftrain.data.lsh import band_edges, components
from efftrain.data.minhash import MinHash
from efftrain.data.near_duplicates import Signed, hash_bands, sign
from efftrain.data.reading import Kept
from efftrain.data.removals import alive_records
from efftrain.data.shingles import shingle_set, words
from efftrain.data.spool import unpack_record
from efftrain.data.verify import jaccard, leaders

SIMILARITIES = np.arange(0.5, 1.0, 0.025)  # the planted similarities
_COPIES = 8  # of each
_WORDS, _BYTES = 100, 40_000  # at least and at most, of a document that is copied


def plant(text: bytes, similarity: float, shingle: int, rng: np.random.Generator) -> bytes:
    """A copy with a block of its words replaced, whose Jaccard similarity is about what is asked."""
    found = words(text)
    n_shingles = len(found) - shingle + 1
    # r shingles that differ on both sides of n: (n - r) / (n + r)
    n_replaced = max(round(n_shingles * (1 - similarity) / (1 + similarity)) - shingle + 1, 0)
    start = int(rng.integers(0, len(found) - n_replaced + 1))
    new = [b"canary%d" % number for number in rng.integers(0, 1 << 40, n_replaced)]
    return b" ".join([*found[:start], *new, *found[start + n_replaced :]])


def check_recall(kept: Kept, alive: np.ndarray, signed: Signed, config: MinHash) -> dict[str, Any]:
    """Plants copies of the first documents that are long enough.

    Returns:
      ``canary``: how many copies at or above the threshold were planted, and how many verified duplicates were found;
      ``recall``: rows of similarity (in steps of 0.05), pairs, and how many became candidates.
    """
    originals, copies = _planted(kept, alive, config)
    if not originals:
        return {"canary": {"planted": 0, "found": 0}, "recall": []}
    numbers = np.array(originals, np.int64)
    places = np.arange(len(copies)) + len(kept)  # numbers that no document has
    signatures = np.concatenate([signed.rows(kept, numbers, "signatures"), sign(copies, config)])
    sources = np.array([kept.entry(number)["source"] for number in originals])
    copied = hash_bands(signatures[len(numbers) :], sources, config)
    stored = signed.rows(kept, numbers, "bands").T
    rows: dict[float, list[int]] = {}
    planted = found = 0
    for i, (original, place) in enumerate(zip(originals, places.tolist(), strict=True)):
        sets = {
            original: shingle_set(kept.text(original), config.shingle),
            place: shingle_set(copies[i], config.shingle),
        }
        similarity, pair = jaccard(sets[original], sets[place]), np.array([original, place])
        shared = [
            band_edges(hashes, pair, config.max_bucket)[0] for hashes in np.stack([stored[:, i], copied[:, i]], 1)
        ]
        candidate = len(components(np.concatenate(shared))[0]) == 2
        row = rows.setdefault(round(np.floor(similarity * 20) / 20, 2), [0, 0])
        row[0] += 1
        row[1] += candidate
        if similarity >= config.threshold:
            planted += 1
            of_pair = signatures[[i, len(numbers) + i]]
            found += candidate and bool(leaders(pair, of_pair, sets.__getitem__, config))
    return {
        "canary": {"planted": planted, "found": found},
        "recall": [{"similarity": s, "pairs": n, "found": k} for s, (n, k) in sorted(rows.items())],
    }


def _planted(kept: Kept, alive: np.ndarray, config: MinHash) -> tuple[list[int], list[bytes]]:
    rng = np.random.default_rng(config.seed)
    wanted = np.tile(SIMILARITIES, _COPIES)
    originals, copies = [], []
    for piece in range(kept.n_pieces):
        for number, record in alive_records(kept, alive, piece):
            text = unpack_record(record)[3]
            if len(text) <= _BYTES and len(words(text)) >= _WORDS:
                originals.append(number)
                copies.append(plant(text, float(wanted[len(copies)]), config.shingle, rng))
                if len(copies) == len(wanted):
                    return originals, copies
    return originals, copies
