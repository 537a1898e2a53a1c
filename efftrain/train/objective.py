"""What a model is trained on: a function from a batch to sums.

An objective returns sums and counts and never means, so that padding, accumulation and sharding change nothing: the
step divides once, by the global count.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.models.decoder import Decoder
from efftrain.ops.cross_entropy import cross_entropy
from efftrain.sharding.rules import shard_count

Batch = Mapping[str, Array]
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count)
Objective = Callable[[nnx.Module, Batch, Array], tuple[Array, Array, Metrics]]


def next_token_loss(model: Decoder, batch: Batch, key: Array) -> tuple[Array, Array, Metrics]:
    """Cross entropy of the next token.

    Args:
      model: the decoder.
      batch: ``tokens``, ``targets``, ``segments``, ``positions``: (batch, length) int32; ``mask``: bool, False where
        the target does not count.
      key: not used; objectives that draw have it.

    Returns:
      Sum of nats () float32, with the model's ``auxiliary`` loss for each target; number of targets () float32; and
      metrics, of which ``loss`` is the cross entropy alone.
    """
    hidden_btd, metrics = model.hidden(batch["tokens"], segments_bt=batch["segments"], positions_bt=batch["positions"])
    loss = cross_entropy(
        hidden_btd,
        model.head_kernel(),
        batch["targets"],
        batch["mask"],
        shards=shard_count("batch", "length"),
    )
    count = batch["mask"].sum(dtype=jnp.float32)
    auxiliary = metrics.pop("auxiliary", 0.0)
    return loss + auxiliary * count, count, {"loss": (loss, count)} | metrics
