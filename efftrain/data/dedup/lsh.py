"""From signatures to clusters of candidates by sorting, without an index of dictionaries.

Each signature is cut into bands. Documents with an equal band share a bucket; buckets are edges, edges are components.
One band is sorted at a time, or a part of it: entries with equal hashes must come to the same call, others need not.
A component is a list of candidates and not of duplicates: see ``verify``.
"""

from dataclasses import dataclass

import numpy as np

from efftrain.data.dedup.minhash import EMPTY

NO_BAND = np.uint64(0xFFFFFFFFFFFFFFFF)
"""In the place of a band hash: this document has no shingle and shares no bucket. ``band_edges`` drops it."""

_BLOCK = 4096  # documents whose signatures are transposed at a time
_M = np.uint64(0xBF58476D1CE4E5B9)


def collision_probability(similarity: np.ndarray | float, bands: int, rows: int) -> np.ndarray | float:
    """The chance that two documents of a Jaccard similarity share a bucket: ``1 - (1 - s^rows)^bands``.

    Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4.2.
    """
    return 1 - (1 - similarity**rows) ** bands


def band_hashes(signatures: np.ndarray, bands: int, salt_per_document: np.ndarray | None = None) -> np.ndarray:
    """Hashes of the bands of signatures.

    Args:
      signatures: (docs, K) uint32; K is a multiple of ``bands``.
      salt_per_document: (docs,) uint64; documents with different salts share no bucket. A hash of the source keeps
        deduplication within sources.

    Returns:
      (bands, docs) uint64; ``NO_BAND`` in each band of a document without a shingle.
    """
    n_documents, k = signatures.shape
    rows = k // bands
    result = np.empty((bands, n_documents), np.uint64)
    for start in range(0, n_documents, _BLOCK):
        block = signatures[start : start + _BLOCK]
        columns = np.ascontiguousarray(block.T).astype(np.uint64)
        salt = np.zeros(len(block), np.uint64)
        if salt_per_document is not None:
            salt = _mixed(salt_per_document[start : start + _BLOCK].astype(np.uint64))
        for band in range(bands):
            hashes = _mixed(salt + np.uint64(band + 1))
            for row in range(band * rows, (band + 1) * rows):
                hashes ^= columns[row]
                _mixed(hashes)
            hashes[hashes == NO_BAND] = 0
            result[band, start : start + _BLOCK] = hashes
        result[:, start : start + _BLOCK][:, (block == EMPTY).all(axis=1)] = NO_BAND
    return result


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """One round of splitmix64, in place."""
    hashes *= _M
    hashes ^= hashes >> np.uint64(32)
    return hashes


@dataclass(frozen=True)
class BucketStats:
    """What a band, or a part of it, looked like.

    Attributes:
      documents: with a band hash.
      buckets: that hold two documents or more.
      largest: documents in the largest bucket.
      oversized: buckets above the limit. They are kept: every candidate is verified, so that a large bucket costs time
        and no documents.
    """

    documents: int
    buckets: int
    largest: int
    oversized: int


def band_edges(hashes: np.ndarray, numbers: np.ndarray, max_bucket: int) -> tuple[np.ndarray, BucketStats]:
    """Joins the documents of each bucket of one band.

    Args:
      hashes: (docs,) uint64 band hashes.
      numbers: (docs,) int64 document numbers, each once.
      max_bucket: buckets with more documents are reported.

    Returns:
      edges: (m, 2) int64: (smallest number of the bucket, another of it), n - 1 for a bucket of n. The set of edges
        does not depend on the order of the entries.
      stats: of the buckets.
    """
    order = np.argsort(hashes)
    ordered = hashes[order]
    n = int(np.searchsorted(ordered, NO_BAND))
    equal = ordered[1:n] == ordered[: max(n - 1, 0)]
    # Only the buckets of two or more from here on; in usual text they are a small part.
    joined = np.zeros(n, bool)
    joined[1:] = equal
    joined[:-1] |= equal
    members = numbers[order[:n][joined]]
    is_first = np.ones(n, bool)
    np.logical_not(equal, out=is_first[1:])
    starts = np.flatnonzero(is_first[joined])
    if not len(starts):
        return np.empty((0, 2), np.int64), BucketStats(n, 0, min(n, 1), 0)
    smallest = np.minimum.reduceat(members, starts)
    sizes = np.diff(starts, append=len(members))
    centre = np.repeat(smallest, sizes)
    edges = np.stack([centre, members], axis=1)[members != centre]
    return edges, BucketStats(n, len(starts), int(sizes.max()), int((sizes > max_bucket).sum()))


def components(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of the documents that an edge touches.

    Args:
      edges: (m, 2) int64 document numbers; repeats do no harm. Memory: a byte per number up to the largest, and some 60
        bytes per edge.

    Returns:
      members: (touched,) int64 document numbers, rising.
      labels: (touched,) int64, the smallest number of the member's component.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(edges):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    touched = np.zeros(int(edges.max()) + 1, bool)
    touched[edges.ravel()] = True
    members = np.flatnonzero(touched)
    ends = [np.searchsorted(members, edges[:, side]).astype(np.int32) for side in (0, 1)]
    graph = coo_array((np.ones(len(edges), np.int8), tuple(ends)), shape=(len(members), len(members)))
    _, component = connected_components(graph, directed=False)
    _, smallest = np.unique(component, return_index=True)
    return members, members[smallest[component]]
