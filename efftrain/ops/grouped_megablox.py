"""Grouped products by JAX's Pallas kernel for TPUs ("megablox"), which computes only the rows that exist."""

from jax import Array

TILES = (512, 1024, 1024)  # rows, contraction, columns: what fits the fast memory of a v5e; not measured


def row_tile(n_rows: int) -> int:
    """Rows of a tile, of which the kernel takes a multiple: 512, or 256 or 128 if there are fewer rows."""
    return next((tile for tile in (TILES[0], TILES[0] // 2) if n_rows >= tile), TILES[0] // 4)


def megablox_matmul(x_rd: Array, w_edf: Array, sizes_e: Array, *, interpret: bool = False) -> Array:
    """Multiplies each row with the matrix of its group: (rows, f) in the dtype of x, sums in float32.

    Args:
      x_rd: sorted rows, a multiple of ``row_tile``; the results of rows after the last group are undefined.
      w_edf: (groups, d, f).
      sizes_e: (groups,) int32, number of rows of each group.
      interpret: run the kernel's Python code on any platform; slow, for tests.

    Source: jax.experimental.pallas.ops.tpu.megablox; Gale et al. 2022 (MegaBlocks).
    """
    from jax.experimental.pallas.ops.tpu.megablox.ops import gmm  # here: a slow import that only TPUs need

    tiling = row_tile(x_rd.shape[0]), min(TILES[1], w_edf.shape[1]), min(TILES[2], w_edf.shape[2])
    return gmm(x_rd, w_edf, sizes_e, x_rd.dtype, tiling, interpret=interpret)
