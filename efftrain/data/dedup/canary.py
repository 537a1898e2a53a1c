"""Measures the recall of near-duplicate detection in each build, with planted pairs of known similarity.

The pairs are written as an additional piece after those of the corpus and pass through every stage that detects near
duplicates, so that a fault in any of them shows as missing pairs. Their texts are words of the corpus in random order
and so resemble no document. They do not affect the corpus: planted and real documents of a component are verified
separately (``near_duplicates.Verify``).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from efftrain.data.dedup.exact import text_digest
from efftrain.data.dedup.minhash import MinHash
from efftrain.data.dedup.shingles import shingle_set, words
from efftrain.data.dedup.verify import jaccard
from efftrain.data.documents import Document, Text
from efftrain.data.stages.kept_documents import INDEX, KeptDocuments, index_entry
from efftrain.data.stages.spool import pack_document, unpack_record
from efftrain.data.stages.stage import stem

SIMILARITIES = np.tile(np.arange(0.5, 1.0, 0.025), 8)
"""(pairs,) approximate Jaccard similarity of the two texts of each pair."""

SOURCE = "planted"
_WORDS = 100, 400  # smallest and largest number of words of a planted text
_POOL_BYTES, _FEWEST = 1 << 20, 20  # bytes of text that supply words; fewest distinct words for which pairs are planted


def edited_copy(found: Sequence[bytes], similarity: float, shingle: int, rng: np.random.Generator) -> list[bytes]:
    """Returns the words of a text with one block replaced, for an approximate Jaccard similarity to the original.

    Args:
      found: the words of the original.
      similarity: the Jaccard similarity of the shingles of original and copy.
      shingle: words per shingle.
      rng: the source of randomness.
    """
    n_shingles = len(found) - shingle + 1
    # If r of n shingles differ, the Jaccard similarity is (n - r) / (n + r).
    n_replaced = max(round(n_shingles * (1 - similarity) / (1 + similarity)) - shingle + 1, 0)
    start = int(rng.integers(0, len(found) - n_replaced + 1))
    new = [b"canary%d" % number for number in rng.integers(0, 1 << 40, n_replaced)]
    return [*found[:start], *new, *found[start + n_replaced :]]


def plant(kept: KeptDocuments, alive: np.ndarray, config: MinHash) -> KeptDocuments:
    """Writes the planted pairs as a new piece beside the others: each original is followed by its copy.

    Args:
      kept: the documents of the corpus.
      alive: (documents,) bool, the documents that have not been removed.
      config: the near-duplicate detection that is tested.

    Returns:
      ``kept`` with one more piece, which is empty if the corpus has too few words to compose texts.
    """
    rng = np.random.default_rng(config.seed)
    pool = _words(kept, alive)
    index: list[tuple] = []
    with kept.records_path(kept.n_pieces).open("wb") as records:
        for number, similarity in enumerate(SIMILARITIES.tolist() if len({*pool}) >= _FEWEST else ()):
            original = [pool[i] for i in rng.integers(0, len(pool), int(rng.integers(*_WORDS)))]
            for kind, text in (
                ("original", original),
                ("copy", edited_copy(original, similarity, config.shingle, rng)),
            ):
                utf8 = b" ".join(text)
                document = Document(f"{kind} {number}", utf8.decode(), SOURCE)
                record = pack_document(document, utf8)
                index.append(
                    index_entry(
                        document,
                        Text(document.text),
                        text_digest(document.text),
                        offset=records.tell(),
                        size=len(record),
                        seed=0,
                        split_seed=0,
                        quality=0.0,
                    )
                )
                records.write(record)
    np.save(kept.folder / f"{stem(kept.n_pieces)}.index.npy", np.array(index, INDEX))
    return KeptDocuments(kept.folder, [*np.diff(kept.starts), len(index)])


def check_recall(
    planted: KeptDocuments, found: set[int], members: np.ndarray, labels: np.ndarray, config: MinHash
) -> dict[str, Any]:
    """Compares the planted pairs that the stages found with those that were planted.

    Args:
      planted: the documents, with the piece of ``plant`` as the last one.
      found: numbers of the planted documents that verification would have removed.
      members, labels: the result of ``lsh.components``; two documents are candidates if they have the same label.
      config: the near-duplicate detection that is tested.

    Returns:
      ``canary``: the number of pairs at or above the threshold that were planted and that were found; ``recall``: rows
      of similarity (in steps of 0.05), number of pairs, and number of pairs that became candidates.
    """
    piece = planted.n_pieces - 1
    first, stop = planted.starts[piece : piece + 2].tolist()
    label_of = dict(zip(members.tolist(), labels.tolist(), strict=True))
    everything = np.ones(len(planted), bool)
    texts = [unpack_record(record)[3] for _, record in planted.records(everything, piece)]
    rows: dict[float, list[int]] = {}
    n_planted = n_found = 0
    for original in range(first, stop, 2):
        sets = [shingle_set(text, config.shingle) for text in texts[original - first : original - first + 2]]
        similarity = jaccard(*sets)
        row = rows.setdefault(round(np.floor(similarity * 20) / 20, 2), [0, 0])
        row[0] += 1
        row[1] += label_of.get(original, -1) == label_of.get(original + 1, -2)
        if similarity >= config.threshold:
            n_planted += 1
            n_found += bool(found & {original, original + 1})
    return {
        "canary": {"planted": n_planted, "found": n_found},
        "recall": [{"similarity": s, "pairs": n, "found": k} for s, (n, k) in sorted(rows.items())],
    }


def _words(kept: KeptDocuments, alive: np.ndarray) -> list[bytes]:
    """Returns the normalised words of the first documents."""
    pool: list[bytes] = []
    left = _POOL_BYTES
    for piece in range(kept.n_pieces):
        for _, record in kept.records(alive, piece):
            text = unpack_record(record)[3][:left].decode(errors="ignore").encode()
            pool += words(text)
            left -= len(text)
            if left <= 0:
                return pool
    return pool
