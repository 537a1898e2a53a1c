"""Estimates the cost of a training step on a mesh by formulas, to rank hundreds of mesh shapes in seconds.

The estimate is coarse on purpose: it models the activations and the traffic of a pre-norm decoder in units of its
width; the best shapes are compiled afterwards. The formulas of the traffic are in ``efftrain/sharding/README.md``,
after Austin et al. 2025, "How to Scale Your Model", part 5.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from efftrain.measure.cost.flops import (
    FORWARD_AND_BACKWARD,
    mean_computed_keys,
    training_flops,
    training_hardware_flops,
)
from efftrain.measure.cost.parameters import count_parameters, parameters
from efftrain.models.config import MlpConfig, ModelConfig, standard_attention
from efftrain.models.decoder import Decoder
from efftrain.models.moe import MoE
from efftrain.ops.fused_linear_loss import CHUNK_ELEMENTS
from efftrain.sharding.roofline import Roofline, axis_bandwidth, sent_bytes
from efftrain.sharding.topologies import Topology
from efftrain.train.config import Training

# Number of tensors of (tokens, d_model) that one block reads and writes in a forward pass: norms, projections,
# rotations, residuals and a feed-forward part of about three times the width.
BLOCK_TENSORS = 24


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimated cost of a training step for one device.

    Attributes:
      mesh: size of each mesh axis.
      memory_bytes: memory that the step needs.
      flops: FLOPs of the step.
      hbm_bytes: bytes that the step moves to and from memory.
      times: lower bounds of the time by compute, memory and network.
    """

    mesh: dict[str, int]
    memory_bytes: float
    flops: float
    hbm_bytes: float
    times: Roofline


def estimate(
    model: Decoder,
    training: Training,
    state: Any,
    mesh: Mesh,
    topology: Topology,
    *,
    teacher: Decoder | None = None,
    frozen: Any = None,
) -> Estimate:
    """Estimates memory, FLOPs and traffic of a training step on one device.

    Args:
      model: abstract model with a ``config``.
      training: gives the batch size, the length and the number of micro-batches.
      state: abstract train state with its shardings on ``mesh``.
      mesh: mesh of the topology's devices.
      topology: its chip decides the times; all times are 0 if the chip is not known.
      teacher: abstract teacher, which computes one forward pass. None: there is no teacher.
      frozen: abstract variables of the teacher, with their shardings.
    """
    config: ModelConfig = model.config
    sizes = dict(mesh.shape)
    tokens = training.batch_size * training.length / mesh.size * sizes["tensor"]  # of a device's rows and positions
    flops = training_hardware_flops(model, training.length) * tokens / sizes["tensor"]
    width = jnp.dtype(config.dtype).itemsize
    hbm = _hbm_bytes(model, training, state, tokens, sizes["tensor"], width)
    if teacher is not None:
        flops += training_flops(teacher, training.length) / FORWARD_AND_BACKWARD * tokens / sizes["tensor"]
        hbm += training.n_microbatches * count_parameters(teacher).total / sizes["tensor"] * width
    memory = _device_bytes(state) + _device_bytes(frozen)
    memory += _temporaries(config, training, state, tokens, sizes["tensor"], width)
    chip = topology.chip
    if chip is None:
        times = Roofline(compute_s=0.0, hbm_s=0.0, ici_s=0.0)
    else:
        seconds = sum(
            sent / axis_bandwidth(topology, mesh, axes)
            for axes, sent in axis_traffic(model, training, sizes, teacher).items()
            if sent
        )
        times = Roofline(compute_s=flops / chip.bf16_flops, hbm_s=hbm / chip.hbm_bytes_per_s, ici_s=seconds)
    return Estimate(mesh=sizes, memory_bytes=memory, flops=flops, hbm_bytes=hbm, times=times)


def axis_traffic(
    model: Decoder, training: Training, sizes: dict[str, int], teacher: Decoder | None = None
) -> dict[tuple[str, ...], float]:
    """Bytes that one device sends in a step along each group of mesh axes.

    - fsdp: every micro-batch gathers the parameters for the forward and the backward pass in the compute dtype, and
      scatters the gradients.
    - replica, expert and context: one all-reduce of the gradients in float32 per step; not along expert for the
      gradients of experts.
    - expert: the rows of a mixture are sent to the experts and back in each pass.
    - tensor: two sums of the residual stream in each pass of a block.
    - context: the keys and values of the other devices are gathered in each pass.
    """
    config: ModelConfig = model.config
    width, passes = jnp.dtype(config.dtype).itemsize, 3 if config.remat == "full" else 2
    fsdp, expert, tensor, context = (sizes[axis] for axis in ("fsdp", "expert", "tensor", "context"))
    experts = sum(v.size for _, v in parameters(model) if "experts" in (v.get_metadata().get("axes") or ()))
    others = (count_parameters(model).total - experts) / tensor
    experts /= tensor * expert
    gathers = 2 * sent_bytes("all-gather", (others + experts) * width, fsdp)
    if teacher is not None:  # its other traffic is left out
        gathers += sent_bytes("all-gather", count_parameters(teacher).total / tensor * width, fsdp)
    scatter = sent_bytes("reduce-scatter", (others + experts) * width, fsdp)
    tokens = training.batch_size * training.length / (sizes["replica"] * fsdp * expert)
    stream = tokens / context * config.d_model * width
    attentions = [standard_attention(layer, "the estimate of a mesh") for layer in config.layers]
    kv = sum(2 * a.n_kv_heads * a.d_head for a in attentions) * tokens * width
    rows = sum(_rows_per_token(layer.mlp, expert) for layer in config.layers)
    copies = sizes["replica"] * context
    return {
        ("fsdp",): training.n_microbatches * (gathers + scatter),
        ("replica", "expert", "context"): sent_bytes("all-reduce", others * 4 / fsdp, copies * expert),
        ("replica", "context"): sent_bytes("all-reduce", experts * 4 / fsdp, copies),
        ("expert",): 2 * passes * sent_bytes("all-to-all", rows * stream, expert),
        ("tensor",): config.n_layers * 2 * passes * sent_bytes("all-reduce", stream, tensor),
        ("context",): passes * sent_bytes("all-gather", kv / tensor, context),
    }


def _rows_per_token(mlp: MlpConfig, devices: int) -> float:
    """Rows per token in an exchange between devices, including empty rows."""
    if not isinstance(mlp, MoE):
        return 0.0
    return mlp.top_k * min(devices, mlp.exchange_factor or devices)


def _temporaries(config: ModelConfig, training: Training, state: Any, tokens: float, tensor: int, width: int) -> float:
    """Bytes of gradients, saved activations, the intermediate tensors of one block, and a chunk of logits."""
    tokens /= training.n_microbatches
    gradients = _device_bytes(state.params)
    one_block = tokens * config.d_model * width * (4 + BLOCK_TENSORS / tensor)
    saved = tokens * config.d_model * width * config.n_layers
    attention = max(_scores(config, training, tokens, layer, tensor) for layer in config.layers)
    blocks = one_block + attention if config.remat != "none" else (one_block + attention) * config.n_layers
    return gradients + saved + blocks + 2 * min(CHUNK_ELEMENTS, tokens * config.vocab_size) * 4


def _scores(config: ModelConfig, training: Training, tokens: float, layer: Any, tensor: int) -> float:
    attention = standard_attention(layer, "the estimate of a mesh")
    keys = mean_computed_keys(training.length, attention.window, attention.n_blocks)
    return tokens * attention.n_heads / tensor * keys * 4


def _hbm_bytes(model: Decoder, training: Training, state: Any, tokens: float, tensor: int, width: int) -> float:
    config: ModelConfig = model.config
    passes = 4 if config.remat == "full" else 3
    weights = passes * training.n_microbatches * count_parameters(model).total / tensor * width
    update = 2 * _device_bytes(state) + _device_bytes(state.params)
    blocks = passes * config.n_layers * tokens * config.d_model * width * (4 + BLOCK_TENSORS / tensor)
    scores = passes * 2 * sum(_scores(config, training, tokens, layer, tensor) for layer in config.layers)
    return weights + update + blocks + scores


def _device_bytes(tree: Any) -> float:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
