"""Upcycling: turns a trained dense decoder into a mixture of experts that computes the same function."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from efftrain.errors import ConfigError
from efftrain.models.block import Block
from efftrain.models.config import Dense, Full, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.moe.layer import MoE, RoutedExperts

# Fields of ``ModelConfig`` in which the mixture and the dense model must agree.
SAME = (
    "vocab_size",
    "d_model",
    "n_layers",
    "tied_embedding",
    "norm",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_multiplier",
    "logit_softcap",
    "head_bias",
    "learned_positions",
)


def upcycle(dense: Decoder, config: ModelConfig, *, rngs: nnx.Rngs) -> Decoder:
    """Returns a mixture of experts whose experts are copies of the dense feed-forward parts; the routers are new.

    The gates of a token sum to 1, so that the first step computes the same as the dense model. The copies become
    different as they see different tokens. Start at the learning rate that the dense model had in the middle of its
    training.

    Args:
      dense: a trained model.
      config: configuration of the mixture: that of the dense model, except that feed-forward parts may be ``MoE`` with
        ``d_expert`` equal to ``d_ff``.
      rngs: random keys for the routers.

    Raises:
      ConfigError: the shapes differ, or the gates do not sum to 1.

    Source: Komatsuzaki et al. 2022 (sparse upcycling), section 3; gates as in He et al. 2024.
    """
    check_upcycling(dense.config, config)
    routed = Decoder(config, rngs=rngs)
    layers = dense.layers()
    parts = ["embedding", "norm"]
    parts += [] if config.tied_embedding else ["head"]
    parts += ["positions"] if config.learned_positions else []
    for variable in parts:
        nnx.update(getattr(routed, variable), nnx.state(getattr(dense, variable)))
    for position, stack in enumerate(routed.blocks):
        _fill(stack, layers[position :: len(config.pattern)])
    return routed


def check_upcycling(dense: ModelConfig, config: ModelConfig) -> None:
    """Raises ``ConfigError`` if ``upcycle`` cannot make a model of ``config`` from one of ``dense``."""
    for name in (*SAME, *(("max_length",) if config.learned_positions else ())):
        if getattr(dense, name) != getattr(config, name):
            raise ConfigError(
                f"model.{name} is {getattr(config, name)} and the dense model has {getattr(dense, name)}; give both "
                "the same value"
            )
    for i, (old, new) in enumerate(zip(dense.layers, config.layers, strict=True)):
        where = f"layer {i}: "
        if not isinstance(old.mlp, Dense):
            raise ConfigError(f"{where}the model to upcycle has {type(old.mlp).__name__} there; give a dense model")
        if not old.depth == new.depth == Full():
            raise ConfigError(
                f"{where}the block has a depth policy, and upcycling copies only blocks without one; use Full"
            )
        if old.residual != new.residual:
            raise ConfigError(f"{where}the residual form differs from the dense model's; give both the same residual")
        if replace(old.attention, n_blocks=1, backend="auto") != replace(new.attention, n_blocks=1, backend="auto"):
            raise ConfigError(f"{where}attention differs from the dense model's; give both the same attention")
        if not isinstance(new.mlp, MoE):
            if new.mlp != old.mlp:
                raise ConfigError(f"{where}mlp is neither an MoE nor that of the dense model; use one of the two")
        elif old.mlp != Dense(d_ff=old.mlp.d_ff):
            raise ConfigError(
                f"{where}experts are SwiGLU without biases, and the dense model's mlp is not; give such a model"
            )
        elif new.mlp.d_expert != old.mlp.d_ff:
            raise ConfigError(
                f"{where}moe.d_expert is {new.mlp.d_expert} and the dense model's d_ff {old.mlp.d_ff}; upcycling "
                f"copies it whole, set d_expert to {old.mlp.d_ff}"
            )
        elif not new.mlp.gates_sum_to_one or new.mlp.n_shared:
            raise ConfigError(
                f"{where}upcycling needs gates that sum to 1 and no shared experts; use moe.top_k 2 or more, "
                "moe.renormalize and moe.n_shared 0"
            )


def _fill(stack: nnx.Module, layers: Sequence[nnx.Module]) -> None:
    """Writes the parameters of single layers into a stacked block."""
    routed = isinstance(stack, Block) and isinstance(stack.mlp, RoutedExperts)
    for path, variable in nnx.to_flat_state(nnx.state(stack, nnx.Param)):
        if path[:2] == ("mlp", "router"):
            continue
        expert = routed and path[0] == "mlp"
        source = (*path, "kernel") if expert else path
        values = jnp.stack([_variable(layer, source)[...] for layer in layers])
        _variable(stack, path)[...] = jnp.broadcast_to(values[:, None], variable.shape) if expert else values


def _variable(module: nnx.Module, path: tuple) -> nnx.Variable:
    found: Any = module
    for name in path:
        found = getattr(found, name)
    return found
