"""Mixture of experts: a feed-forward part of many experts, of which each token uses a few."""

import functools
import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.config import LATER
from efftrain.errors import ConfigError
from efftrain.models.components import Dtype, MlpConfig, RouterConfig
from efftrain.models.mlp import FeedForward
from efftrain.models.moe.expert_parallel import ExpertRun, Experts, experts_on_mesh
from efftrain.models.quantization import Matrix, read
from efftrain.ops.grouped_matmul import Dispatch
from efftrain.ops.platform import platform
from efftrain.ops.routing import (
    Routing,
    Scores,
    balance_loss,
    balanced_bias,
    entropy,
    max_violation,
    route,
    router_logits,
    without_padding,
    z_loss,
)
from efftrain.progress import console

# The dropless dispatch of each platform. cpu: the fastest one measured (tests/bench/results/moe.json). tpu: compiled
# only, not run. gpu: not measured; not ragged_dot, which may be dense there.
DISPATCH: dict[str, Dispatch] = {"cpu": "blocks", "gpu": "blocks", "tpu": "megablox"}

STARVED_SHARE = 0.01  # share of the mean load below which an expert learns next to nothing
STARVED_STEPS = 500
COLLAPSED = "moe/collapsed"  # metric: share of the experts that have starved for STARVED_STEPS


@dataclass(frozen=True, kw_only=True)
class MoE(MlpConfig):
    """Routed SwiGLU experts. A token costs ``top_k + n_shared`` experts; memory holds all of them.

    Padding (segment 0) goes to no routed expert: it takes no rows, and is not part of any load, loss or metric.

    Attributes:
      n_experts: number of routed experts.
      top_k: number of routed experts per token.
      d_expert: hidden width of an expert.
      n_shared: number of experts that every token uses in addition, computed as one.
      scores: see ``ops.routing.route``.
      renormalize: scale the gates of a token to sum to 1. None: if top_k is above 1.
      bias_rate: step size of the balancing bias (auxiliary-loss-free balancing, see ``ops.routing.balanced_bias``); 0:
        no bias.
      auxiliary_loss: weight of the balance loss of Switch Transformer. It works against the main loss: small, or 0.
      z_loss: weight of the router's z-loss; 1e-3 if logits grow.
      dispatch: how rows reach their experts, see ``ops.grouped_matmul``. "auto": by platform, without dropping.
        "capacity": drops what does not fit, also in evaluation, so that its figures depend on which rows are computed
        together. "reference": computes every expert on every token, for tests.
      capacity_factor: number of rows of an expert relative to the mean load of a batch without padding, for "capacity".
      exchange_factor: on an expert-parallel mesh, number of rows that a device sends to another, relative to the mean.
        Further rows are dropped and counted. None: space for every row, which multiplies the memory for rows by the
        number of devices.
      saliency: record gate times output norm of each expert beside its load, for pruning.
      router: chooses experts and gates in place of the learned matrix and ``scores``. None: the learned matrix.
    """

    n_experts: int = 8
    top_k: int = 2
    d_expert: int
    n_shared: int = 0
    scores: Scores = "softmax"
    renormalize: bool | None = None
    bias_rate: float = 2e-2
    auxiliary_loss: float = 0.0
    z_loss: float = 0.0
    dispatch: Dispatch | Literal["auto", "reference"] = "auto"
    capacity_factor: float = 1.25
    exchange_factor: float | None = None
    saliency: bool = False
    router: RouterConfig | None = field(default=None, metadata=LATER)

    def __post_init__(self):
        for name in ("n_experts", "top_k", "d_expert"):
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
        for name in ("capacity_factor", "exchange_factor"):
            if (factor := getattr(self, name)) is not None and not factor > 0:
                raise ConfigError(f"moe.{name} is {factor}; it must be positive, such as 1.25")
        if self.dispatch not in (names := ("auto", *get_args(Dispatch), "reference")):
            raise ConfigError(f"moe.dispatch is {self.dispatch!r}; use one of {', '.join(names)}")
        if self.saliency and self.dispatch == "reference":
            raise ConfigError("moe.saliency needs rows, which dispatch 'reference' does not make; use auto")
        if self.router is not None and self.z_loss:
            raise ConfigError(
                f"moe.z_loss is {self.z_loss}, but moe.router {type(self.router).__name__} has no logits to penalise; "
                "set z_loss to 0"
            )

    @property
    def reads_tokens(self) -> bool:
        return self.router is not None

    @property
    def independent_tokens(self) -> bool:
        return self.dispatch != "capacity" and self.exchange_factor is None

    @property
    def reads_segments(self) -> bool:
        return True

    def build(self, d_model: int, *, n_layers: int, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Module:
        return RoutedExperts(self, d_model, n_layers=n_layers, dtype=dtype, rngs=rngs)

    def other_flops(self) -> float:
        """FLOPs of the experts beside their parameter matrices; ``router`` states its own."""
        return 0.0

    @property
    def gates_sum_to_one(self) -> bool:
        return self.top_k > 1 if self.renormalize is None else self.renormalize

    def capacity(self, n_tokens: int) -> int:
        """Number of rows of an expert for ``n_tokens`` tokens, never more than there are tokens."""
        return min(math.ceil(self.capacity_factor * n_tokens * self.top_k / self.n_experts), n_tokens)


class BalanceBias(nnx.Variable):
    """Balancing bias of the router: not trained, but moved once per step by the global loads."""


class StarvedSteps(nnx.Variable):
    """Number of consecutive steps in which an expert's load was below ``STARVED_SHARE`` of the mean."""


class RoutedExperts(nnx.Module):
    """The module of ``MoE``: a router, its experts, and the experts that all tokens share."""

    def __init__(self, config: MoE, d_model: int, *, n_layers: int, dtype: Dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        n, f = config.n_experts, config.d_expert
        # float32: bf16 scores tie often enough to unbalance the experts.
        if config.router is None:
            self.router = nnx.Param(
                nnx.initializers.truncated_normal(0.02)(rngs.params(), (d_model, n)),
                axes=("embed", "choices"),
                units=(d_model, n),
            )
        else:
            self.router = config.router.build(config, d_model, rngs=rngs)

        def experts(d_in: int, d_out: int, axes: tuple[str, str], gain: float = 1.0) -> Matrix:
            # The expert axis is a batch axis: as part of the fan-in it would shrink the weights of every expert.
            init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
            shape = (n, d_in, d_out)
            return Matrix(
                init(rngs.params(), shape) * gain,
                axes=("experts", *axes),
                units=shape,
                active=config.top_k / n,
                contraction=-2,
            )

        self.gate = experts(d_model, f, ("embed", "mlp"))
        self.up = experts(d_model, f, ("embed", "mlp"))
        self.down = experts(f, d_model, ("mlp", "embed"), gain=(2 * n_layers) ** -0.5)
        self.bias = BalanceBias(jnp.zeros(n), axes=("choices",), units=(n,))
        self.starved = StarvedSteps(jnp.zeros(n, jnp.int32), axes=("choices",), units=(n,))
        if config.n_shared:
            self.shared = FeedForward(d_model, config.n_shared * f, n_layers=n_layers, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_btd: Array, tokens_bt: Array | None = None, segments_bt: Array | None = None
    ) -> tuple[Array, dict]:
        config, n = self.config, x_btd.shape[0] * x_btd.shape[1]
        if isinstance(self.router, nnx.Variable):
            logits_ne = router_logits(x_btd.reshape(n, -1), self.router[...])
            routing = route(
                logits_ne,
                self.bias[...],
                top_k=config.top_k,
                scores=config.scores,
                renormalize=config.gates_sum_to_one,
            )
        else:
            routing = self.router(x_btd, tokens_bt, self.bias[...])
        valid_n = jnp.ones(n, bool) if segments_bt is None else segments_bt.reshape(n) != 0
        routing = without_padding(routing, valid_n)
        found = self._experts(x_btd, routing)
        y_btd = found.y.astype(x_btd.dtype)
        if config.n_shared:
            y_btd += self.shared(x_btd)[0]
        n_valid = valid_n.sum(dtype=jnp.float32)
        metrics = {
            "moe/entropy": (jnp.where(valid_n, entropy(routing.probabilities_ne), 0).sum(), n_valid),
            "moe/dropped": (found.dropped, n_valid * config.top_k),
            "statistics": {"loads": found.loads_e} | ({"saliency": found.saliency_e} if config.saliency else {}),
        }
        if config.auxiliary_loss or config.z_loss:
            balance = balance_loss(found.loads_e, routing.probabilities_ne, valid_n)
            metrics["auxiliary"] = config.auxiliary_loss * balance
            if config.router is None:
                metrics["auxiliary"] += config.z_loss * z_loss(logits_ne, valid_n)
        return y_btd, metrics

    def _experts(self, x_btd: Array, routing: Routing) -> Experts:
        config = self.config
        gate, up, down = (read(self, name, self.dtype) for name in ("gate", "up", "down"))
        x_btd = x_btd.astype(self.dtype)
        if config.dispatch == "reference":
            y_nd = every_expert(x_btd.reshape(-1, x_btd.shape[-1]), routing, gate, up, down)
            loads_e = jnp.bincount(routing.experts_nk.reshape(-1), length=config.n_experts).astype(jnp.float32)
            return Experts(y_nd.reshape(x_btd.shape), loads_e, jnp.float32(0), jnp.zeros_like(loads_e))
        run = ExpertRun(
            n_experts=config.n_experts,
            dispatch=choose_dispatch(config.dispatch, platform()),
            capacity=config.capacity,
            exchange_factor=config.exchange_factor,
            saliency=config.saliency,
        )
        experts_btk, gates_btk = (a.reshape(*x_btd.shape[:2], -1) for a in (routing.experts_nk, routing.gates_nk))
        return experts_on_mesh(x_btd, experts_btk, gates_btk, (gate, up, down), run)

    def after_step(self, statistics: dict[str, Array]) -> dict:
        """Moves the balancing bias by the loads of a step; returns the figures of the step.

        Args:
          statistics: ``statistics`` of ``__call__``, summed over the step's micro-batches, with the axis of the stacked
            layers.
        """
        loads_le = statistics["loads"]
        used_l = loads_le.sum(-1) > 0  # depth policies may skip a layer in a step
        moved_le = balanced_bias(self.bias[...], loads_le, self.config.bias_rate)
        self.bias[...] = jnp.where(used_l[:, None], moved_le, self.bias[...])
        relative_le = loads_le / jnp.maximum(loads_le.mean(-1, keepdims=True), 1e-9)
        starved_le = jnp.where(relative_le < STARVED_SHARE, self.starved[...] + used_l[:, None], 0)
        self.starved[...] = starved_le
        layers = used_l.sum(dtype=jnp.float32)

        def over_used(figure_l: Array) -> tuple[Array, Array]:
            return jnp.where(used_l, figure_l, 0).sum(), layers

        return {
            "moe/max_violation": over_used(max_violation(loads_le)),
            "moe/least_load": over_used(relative_le.min(-1)),
            "moe/loads": (relative_le, jnp.float32(1)),
            COLLAPSED: (jnp.sum(starved_le >= STARVED_STEPS, dtype=jnp.float32), jnp.float32(loads_le.size)),
        }


@functools.cache
def choose_dispatch(dispatch: Dispatch | Literal["auto"], platform: str) -> Dispatch:
    """Returns the dispatch that is used, never "auto"; prints it once per process."""
    chosen = DISPATCH[platform] if dispatch == "auto" else dispatch
    console.print(f"experts are dispatched by {chosen!r} ({dispatch!r} on {platform})", markup=False)
    return chosen


def every_expert(x_nd: Array, routing: Routing, gate_edf: Array, up_edf: Array, down_efd: Array) -> Array:
    """(tokens, d_model) float32, computed by all experts on all tokens: the reference for all dispatches."""
    hidden_enf = jax.nn.silu(jnp.einsum("nd,edf->enf", x_nd, gate_edf)) * jnp.einsum("nd,edf->enf", x_nd, up_edf)
    y_end = jnp.einsum("enf,efd->end", hidden_enf, down_efd)
    n_experts = gate_edf.shape[0]
    gates_ne = jnp.einsum("nk,nke->ne", routing.gates_nk, jax.nn.one_hot(routing.experts_nk, n_experts))
    return jnp.einsum("end,ne->nd", y_end, gates_ne, preferred_element_type=jnp.float32)
