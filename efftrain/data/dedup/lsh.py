"""Groups MinHash signatures into clusters of candidates (locality-sensitive hashing) by sorting, without dictionaries.

Each signature is divided into bands. Documents with an equal band share a bucket, each bucket gives edges, and the
connected components of the edges are the clusters. A band, or a part of one, is sorted at a time; entries with equal
hashes must be in the same part. A component contains candidates, which are not all duplicates: see ``verify``.
"""

from dataclasses import dataclass

import numpy as np

from efftrain.data.dedup.minhash import EMPTY

NO_BAND = np.uint64(0xFFFFFFFFFFFFFFFF)
"""Band hash of a document without shingles, which shares no bucket. ``band_edges`` drops it."""

_BLOCK = 4096  # number of documents whose signatures are transposed at a time
_M = np.uint64(0xBF58476D1CE4E5B9)


def collision_probability(similarity: np.ndarray | float, bands: int, rows: int) -> np.ndarray | float:
    """Probability that two documents of a given Jaccard similarity share a bucket: ``1 - (1 - s^rows)^bands``.

    Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4.2.
    """
    return 1 - (1 - similarity**rows) ** bands


def band_hashes(signatures: np.ndarray, bands: int, salt_per_document: np.ndarray | None = None) -> np.ndarray:
    """Hashes each band of each signature.

    Args:
      signatures: (docs, K) uint32; K is a multiple of ``bands``.
      bands: number of bands.
      salt_per_document: (docs,) uint64; documents with different salts share no bucket. A hash of the source restricts
        deduplication to documents of the same source. None: no salt.

    Returns:
      (bands, docs) uint64; ``NO_BAND`` in each band of a document without shingles.
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
    """Statistics of the buckets of a band, or of a part of one.

    Attributes:
      documents: number of documents with a band hash.
      buckets: number of buckets with at least two documents.
      largest: number of documents in the largest bucket.
      oversized: number of buckets above the limit. They are still used: every candidate is verified, so that a large
        bucket costs time but no documents.
    """

    documents: int
    buckets: int
    largest: int
    oversized: int


def band_edges(hashes: np.ndarray, numbers: np.ndarray, max_bucket: int) -> tuple[np.ndarray, BucketStats]:
    """Connects the documents of each bucket of one band by edges.

    Args:
      hashes: (docs,) uint64 band hashes.
      numbers: (docs,) int64 document numbers, without repetition.
      max_bucket: buckets with more documents are counted as oversized.

    Returns:
      edges: (m, 2) int64: pairs of the smallest document number of a bucket and another one; n - 1 edges for a bucket
        of n documents. The set of edges does not depend on the order of the entries.
      stats: statistics of the buckets.
    """
    order = np.argsort(hashes)
    ordered = hashes[order]
    n = int(np.searchsorted(ordered, NO_BAND))
    equal = ordered[1:n] == ordered[: max(n - 1, 0)]
    # Continue with the buckets of two or more documents, which are few in ordinary text.
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
    """Finds the connected components of the documents that have an edge.

    Memory: one byte per document number up to the largest, and about 60 bytes per edge.

    Args:
      edges: (m, 2) int64 document numbers; may contain repetitions.

    Returns:
      members: (touched,) int64 document numbers, ascending.
      labels: (touched,) int64, the smallest document number in the component of each member.
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
