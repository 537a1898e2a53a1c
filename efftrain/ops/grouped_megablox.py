"""Grouped products by JAX's Pallas kernel for TPUs ("megablox"), whose work is that of the rows that there are."""

from jax import Array

ROWS = 128  # the kernel takes a multiple of its tile
TILES = (512, 1024, 1024)  # rows, contracted, columns: what fits the fast memory of a v5e; not measured here


def megablox_matmul(x_rd: Array, w_edf: Array, sizes_e: Array, *, interpret: bool = False) -> Array:
    """(rows, f): each row times the matrix of its group, sums in float32, in the dtype of x.

    Args:
      x_rd: sorted rows, a multiple of ``ROWS``; those behind the last group come out undefined.
      w_edf: (groups, d, f).
      sizes_e: (groups,) int32 rows of each.
      interpret: run the kernel's Python on any platform; slow, for tests.

    Source: jax.experimental.pallas.ops.tpu.megablox; Gale et al. 2022 (MegaBlocks).
    """
    from jax.experimental.pallas.ops.tpu.megablox.ops import gmm  # half a second; only TPUs need it

    rows = next(tile for tile in (TILES[0], TILES[0] // 2, ROWS) if x_rd.shape[0] % tile == 0)
    tiling = rows, min(TILES[1], w_edf.shape[1]), min(TILES[2], w_edf.shape[2])
    return gmm(x_rd, w_edf, sizes_e, x_rd.dtype, tiling, interpret=interpret)
