"""Forward FLOPs per token of the matrices of a module, and of what a layer computes beside its matrices.

Components state the latter (``models.components``); if a component does not, its products are counted from a trace.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from efftrain.measure.cost.parameters import HEAD, active_size, embedding_paths, parameters, passes
from efftrain.measure.cost.traced_flops import traced_flops
from efftrain.models.components import RouterConfig
from efftrain.models.config import Attention, BlockConfig, ModelConfig
from efftrain.models.moe import MoE


def matrix_flops(model: nnx.Module) -> float:
    """Forward FLOPs per token of all parameter matrices except the head and look-up tables.

    A parameter is a matrix if it has at least two axes other than ``layers``.
    """
    free = embedding_paths(model) | {HEAD}
    return sum(
        2.0 * active_size(variable) * max(passes(variable), 1.0)
        for path, variable in parameters(model)
        if path[:-1] not in free and _is_matrix(variable)
    )


def other_flops(block: BlockConfig, model: ModelConfig, length: int, keys: float) -> float:
    """Forward FLOPs per token of what a layer computes beside its matrices, such as attention scores.

    Args:
      block: configuration of the layer.
      model: configuration of the model that the layer is part of.
      length: tokens of a row; components that state no FLOPs are traced with such a row, including masked pairs.
      keys: number of keys that the token sees, for components that state their FLOPs.

    Raises:
      ConfigError: a component does not state its FLOPs, and they cannot be counted from its trace.
    """
    trace = _Trace(block, model, length)
    attention, mlp = block.attention, block.mlp
    total = _stated(attention.score_flops(keys), trace.attention)
    if isinstance(attention, Attention):
        mod = attention.score_mod
        position, scores = attention.position.other_flops(), 0.0 if mod is None else mod.score_flops(keys)
        if position is None or scores is None:
            total += trace.attention() - attention.score_flops(length)
        else:
            total += position + scores
    total += _stated(mlp.other_flops(), trace.mlp)
    if isinstance(mlp, MoE) and mlp.router is not None:
        total += _stated(mlp.router.other_flops(), partial(trace.router, mlp, mlp.router))
    return total + _stated(block.residual.other_flops(), lambda: trace.block() - trace.attention() - trace.mlp())


def _stated(stated: float | None, counted: Callable[[], float]) -> float:
    return counted() if stated is None else stated


class _Trace:
    """Counts FLOPs per token of the products without parameter matrices, by tracing a module on one row."""

    def __init__(self, block: BlockConfig, model: ModelConfig, length: int):
        if isinstance(block.attention, Attention):  # a trace does not show the products of a kernel; count all pairs
            attention = replace(block.attention, backend="xla", n_blocks=1, window=None)
            block = replace(block, attention=attention)
        if isinstance(block.mlp, MoE):
            block = replace(block, mlp=replace(block.mlp, dispatch="reference", saliency=False))
        self._block, self._model, self._length = block, model, length
        self._x = jax.ShapeDtypeStruct((1, length, model.d_model), model.dtype)
        self._ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def attention(self) -> float:
        config = self._block.attention
        return self._beyond(config, lambda rngs: config.build(self._model, rngs=rngs), self._x, self._ids)

    def mlp(self) -> float:
        config, model = self._block.mlp, self._model
        ids = (self._ids,) if config.reads_tokens else ()

        def build(rngs: nnx.Rngs) -> nnx.Module:
            return config.build(model.d_model, n_layers=model.n_layers, dtype=model.dtype, rngs=rngs)

        return self._beyond(config, build, self._x, *ids)

    def router(self, moe: MoE, config: RouterConfig) -> float:
        bias_e = jax.ShapeDtypeStruct((moe.n_experts,), jnp.float32)

        def build(rngs: nnx.Rngs) -> nnx.Module:
            return config.build(moe, self._model.d_model, rngs=rngs)

        return self._beyond(config, build, self._x, self._ids, bias_e)

    def block(self) -> float:
        config = self._block.residual

        def build(rngs: nnx.Rngs) -> nnx.Module:
            return config.build(self._block, self._model, rngs=rngs)

        return self._beyond(config, build, self._x, self._ids, self._ids, self._ids)

    def _beyond(self, config: object, build: Callable[[nnx.Rngs], nnx.Module], *arguments: jax.ShapeDtypeStruct):
        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        graph, state = nnx.split(module)

        def run(state: nnx.State, *arguments: jax.Array):
            return nnx.merge(graph, state)(*arguments)

        # With routed experts, the trace computes all of them, and ``matrix_flops`` subtracts those of one token.
        counted = traced_flops(run, state, *arguments, name=type(config).__name__)
        return counted / self._length - matrix_flops(module)


def _is_matrix(variable: nnx.Variable) -> bool:
    axes = variable.get_metadata().get("axes", ())
    return variable.ndim - ("layers" in axes) >= 2 and "groups" not in axes
