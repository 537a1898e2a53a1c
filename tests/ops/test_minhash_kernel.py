"""The JAX kernel against the NumPy one."""

import numpy as np
import pytest

from efftrain.data.dedup import minhash as numpy_minhash
from efftrain.ops.minhash import minima


@pytest.mark.parametrize("sizes", [[1], [5, 1, 300, 2], [64] * 16, list(range(1, 60))])
def test_same_signatures_as_numpy(sizes):
    """Sizes that are powers of two and sizes that are padded."""
    rng = np.random.default_rng(len(sizes))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    hashes = rng.integers(0, 1 << 32, offsets[-1], dtype=np.uint32)
    a, b = numpy_minhash.permutations(20, 1)
    found = minima(hashes, offsets, a, b)
    assert found.dtype == np.uint32
    np.testing.assert_array_equal(found, numpy_minhash.minima(hashes, offsets, a, b))


def test_takes_the_place_of_the_numpy_kernel():
    """Also where documents without shingles lie between the others."""
    config = numpy_minhash.MinHash()
    hashes, offsets = numpy_minhash.document_hashes([b"", b"one two three four five six", b"-", b"seven"], config)
    np.testing.assert_array_equal(
        numpy_minhash.signatures(hashes, offsets, config, kernel=minima),
        numpy_minhash.signatures(hashes, offsets, config),
    )
