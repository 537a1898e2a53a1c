"""The search for clips: large weights of a group are clipped where that lowers the error of the outputs.

Source: Lin et al. 2024 (AWQ); the search follows the authors' llm-awq.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.ops.number_formats import Format
from efftrain.ops.quantize import QuantizedArray, group_size, learned_quantize, quantize, step_of, stored_scale

CLIPS = tuple(1 - i / 20 for i in range(10))  # clipping limits that are tried, as shares of the largest magnitude


def clipped(w_df: Array, hessian_dd: Array, format: Format) -> QuantizedArray:
    """Quantises a matrix after clipping the largest weights of each group where that lowers the output error.

    The clip is searched for each group of inputs and each output separately, by the error over all tokens.

    Args:
      w_df: the matrix (d, f).
      hessian_dd: sum of ``x x^T`` of its inputs.
      format: number format of the result.
    """
    return quantize(w_df, format, scale=stored_scale(clipped_step(w_df, hessian_dd, format), format))


@partial(jax.jit, static_argnames="format")
def clipped_step(w_df: Array, hessian_dd: Array, format: Format) -> Array:
    """Returns the scales of ``clipped``, float32, one for each group and output, before rounding to their dtype."""
    (d, f), size = w_df.shape, group_size(len(w_df), format)
    n = d // size
    # The diagonal blocks: for each group, the sum of x x^T of its own inputs.
    hessian_gss = hessian_dd.reshape(n, size, n, size)[jnp.arange(n), :, jnp.arange(n)]
    w_df, step_gf = w_df.astype(jnp.float32), step_of(w_df, format)

    def errors(share: Array) -> Array:
        change_gsf = (learned_quantize(w_df, step_gf * share, format) - w_df).reshape(n, size, f)
        return (jnp.einsum("gst,gtf->gsf", hessian_gss, change_gsf, precision="highest") * change_gsf).sum(1)

    clips = jnp.array(CLIPS)
    return step_gf * clips[jnp.argmin(jax.lax.map(errors, clips), axis=0)]
