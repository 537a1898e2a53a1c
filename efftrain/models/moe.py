"""A feed-forward part of many experts, of which each token uses a few."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.config import Dtype, MlpConfig
from efftrain.models.mlp import SwiGLU
from efftrain.ops.grouped_matmul import Dispatch, from_rows, grouped_matmul, layout, to_rows
from efftrain.ops.routing import (
    Routing,
    Scores,
    balance_loss,
    balanced_bias,
    entropy,
    max_violation,
    route,
    z_loss,
)


@dataclass(frozen=True, kw_only=True)
class MoE(MlpConfig):
    """Routed SwiGLU experts. A token costs ``top_k + n_shared`` experts, memory holds all of them.

    Attributes:
      n_experts: routed experts.
      top_k: of which a token uses so many.
      d_expert: hidden width of an expert.
      n_shared: experts that every token uses besides, computed as one.
      scores: see ``ops.routing.route``.
      renormalize: the gates of a token sum to 1. None: where top_k is above 1.
      bias_rate: step of the balancing bias (auxiliary-loss-free, Wang et al. 2024); 0 for none.
      auxiliary_loss: weight of Switch's balance loss. It pulls against the main loss: small, or 0.
      z_loss: weight of the router's z-loss, 1e-3 where logits grow.
      dispatch: how rows reach their experts, see ``ops.grouped_matmul``; "reference" computes every expert on every
        token, for tests.
      capacity_factor: rows of an expert over the mean load, for "capacity".
      block: rows of a block, for "padded".
    """

    n_experts: int = 8
    top_k: int = 2
    d_expert: int
    n_shared: int = 0
    scores: Scores = "softmax"
    renormalize: bool | None = None
    bias_rate: float = 1e-3
    auxiliary_loss: float = 0.0
    z_loss: float = 0.0
    dispatch: Dispatch | Literal["reference"] = "padded"
    capacity_factor: float = 1.25
    block: int = 64

    def __post_init__(self):
        for name in ("n_experts", "top_k", "d_expert", "block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"moe.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("n_shared", "bias_rate", "auxiliary_loss", "z_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(f"moe.{name} is {getattr(self, name)}; it must not be negative")
        if self.top_k > self.n_experts:
            raise ConfigError(
                f"moe.top_k is {self.top_k} but there are {self.n_experts} experts; use top_k <= n_experts"
            )
        if self.top_k == 1 and self.renormalize:
            raise ConfigError(
                "moe.renormalize with top_k 1 makes every gate 1, and the router never learns; leave it None"
            )
        if not self.capacity_factor > 0:
            raise ConfigError(f"moe.capacity_factor is {self.capacity_factor}; it must be positive, such as 1.25")
        if self.dispatch not in ("capacity", "padded", "ragged", "reference"):
            raise ConfigError(f"moe.dispatch is {self.dispatch!r}; use capacity, padded, ragged or reference")

    def build(self, d_model: int, *, n_layers: int, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Module:
        return RoutedExperts(self, d_model, n_layers=n_layers, dtype=dtype, rngs=rngs)

    def capacity(self, n_tokens: int) -> int:
        """Rows of an expert for so many tokens; never more than there are tokens."""
        return min(math.ceil(self.capacity_factor * n_tokens * self.top_k / self.n_experts), n_tokens)


class BalanceBias(nnx.Variable):
    """The router's bias: not trained, moved once a step by the global loads."""


class RoutedExperts(nnx.Module):
    """A router, its experts, and those that all tokens share."""

    def __init__(self, config: MoE, d_model: int, *, n_layers: int, dtype: Dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        n, f = config.n_experts, config.d_expert
        # float32: bf16 scores tie often enough to unbalance the experts.
        self.router = nnx.Param(
            nnx.initializers.truncated_normal(0.02)(rngs.params(), (d_model, n)),
            axes=("embed", None),
            units=(d_model, n),
        )

        def experts(d_in: int, d_out: int, axes: tuple[str, str], gain: float = 1.0) -> nnx.Param:
            # The expert axis is a batch axis: counted into the fan, it would shrink every expert.
            init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
            shape = (n, d_in, d_out)
            return nnx.Param(
                init(rngs.params(), shape) * gain, axes=("experts", *axes), units=shape, active=config.top_k / n
            )

        self.gate = experts(d_model, f, ("embed", "mlp"))
        self.up = experts(d_model, f, ("embed", "mlp"))
        self.down = experts(f, d_model, ("mlp", "embed"), gain=(2 * n_layers) ** -0.5)
        self.bias = BalanceBias(jnp.zeros(n), axes=(None,), units=(n,))
        if config.n_shared:
            self.shared = SwiGLU(d_model, config.n_shared * f, n_layers=n_layers, dtype=dtype, rngs=rngs)

    def __call__(self, x_btd: Array) -> tuple[Array, dict]:
        x_nd = x_btd.reshape(-1, x_btd.shape[-1])
        config, n = self.config, x_btd.shape[0] * x_btd.shape[1]
        logits_ne = x_nd.astype(jnp.float32) @ self.router[...]
        routing = route(
            logits_ne,
            self.bias[...],
            top_k=config.top_k,
            scores=config.scores,
            renormalize=config.top_k > 1 if config.renormalize is None else config.renormalize,
        )
        y_nd, loads_e, dropped = self._experts(x_nd, routing)
        y_btd = y_nd.astype(x_btd.dtype).reshape(x_btd.shape)
        if config.n_shared:
            y_btd += self.shared(x_btd)[0]
        metrics = {
            "moe/entropy": (entropy(routing.probabilities_ne).sum(), jnp.float32(n)),
            "moe/dropped": (dropped.astype(jnp.float32), jnp.float32(n * config.top_k)),
            "statistics": {"loads": loads_e.astype(jnp.float32)},
        }
        if config.auxiliary_loss or config.z_loss:
            metrics["auxiliary"] = config.auxiliary_loss * balance_loss(
                loads_e, routing.probabilities_ne
            ) + config.z_loss * z_loss(logits_ne)
        return y_btd, metrics

    def _experts(self, x_nd: Array, routing: Routing) -> tuple[Array, Array, Array]:
        """Outputs (tokens, d_model) float32, assignments of each expert, and how many were dropped."""
        config = self.config
        weights = [w[...].astype(self.dtype) for w in (self.gate, self.up, self.down)]
        x_nd = x_nd.astype(self.dtype)
        if config.dispatch == "reference":
            loads_e = jnp.bincount(routing.experts_nk.reshape(-1), length=config.n_experts)
            return every_expert(x_nd, routing, *weights), loads_e, jnp.int32(0)
        where = layout(
            routing.experts_nk,
            config.n_experts,
            config.dispatch,
            capacity=config.capacity(len(x_nd)),
            block=config.block,
        )
        y_rd = expert_rows(to_rows(x_nd, where), *weights, where, config.dispatch)
        return from_rows(y_rd, routing.gates_nk, where), where.sizes_e, jnp.sum(where.row_nk >= where.n_rows)

    def after_step(self, statistics: dict[str, Array]) -> dict:
        """Moves the bias by the loads of a step; the figures of the step.

        Args:
          statistics: of ``__call__``, summed over the step's micro-batches, with the axis of the stacked layers.
        """
        loads_le = statistics["loads"]
        self.bias[...] = balanced_bias(self.bias[...], loads_le, self.config.bias_rate)
        shares_le = loads_le / loads_le.sum(-1, keepdims=True)
        layers = jnp.float32(len(loads_le))
        return {
            "moe/max_violation": (max_violation(loads_le).sum(), layers),
            "moe/least_load": (shares_le.min(-1).sum() * self.config.n_experts, layers),
        }


def expert_rows(x_rd: Array, gate_edf: Array, up_edf: Array, down_efd: Array, where, dispatch: Dispatch) -> Array:
    """SwiGLU of each row by the expert of its group."""
    hidden = jax.nn.silu(grouped_matmul(x_rd, gate_edf, where, dispatch))
    hidden *= grouped_matmul(x_rd, up_edf, where, dispatch)
    return grouped_matmul(hidden, down_efd, where, dispatch)


def every_expert(x_nd: Array, routing: Routing, gate_edf: Array, up_edf: Array, down_efd: Array) -> Array:
    """(tokens, d_model) float32 by computing all experts on all tokens: the reference of every other way."""
    hidden_enf = jax.nn.silu(jnp.einsum("nd,edf->enf", x_nd, gate_edf)) * jnp.einsum("nd,edf->enf", x_nd, up_edf)
    y_end = jnp.einsum("enf,efd->end", hidden_enf, down_efd)
    n_experts = gate_edf.shape[0]
    gates_ne = jnp.einsum("nk,nke->ne", routing.gates_nk, jax.nn.one_hot(routing.experts_nk, n_experts))
    return jnp.einsum("end,ne->nd", y_end, gates_ne, preferred_element_type=jnp.float32)
