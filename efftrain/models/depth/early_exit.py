"""Early exit by confidence: tokens leave the stack when they are sure, and the later layers still get their cache.

A token that leaves after some layers keeps its state for all later ones: they compute its keys and values, which later
tokens need, and nothing else. Whole rows can be computed at once with the same result (``exit_states``), because what a
layer sees of a token depends on no later layer.

Source: Schuster et al. 2022 (CALM); as there, the skipped layers take keys and values from the state at the exit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.block import Block
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder

Rule = Literal["gap", "similarity", "probe"]


@dataclass(frozen=True, kw_only=True)
class ConfidenceExit:
    """When a token has passed enough layers.

    Attributes:
      rule: measure of the confidence, which is at most 1. "gap": the probability of the most probable token minus that
        of the second, which costs a head at every exit. "similarity": cosine similarity of the states before and after
        a layer. "probe": a logistic regression on the state, trained to predict whether the last layer would choose the
        same token.
      threshold: a token leaves if its confidence is at least this. Above 1: it leaves only by ``max_layers_b``.
      exits: numbers of layers after which a token may leave. None: after every layer.
    """

    rule: Rule = "gap"
    threshold: float = 0.9
    exits: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.rule not in get_args(Rule):
            raise ConfigError(f"exit.rule is {self.rule!r}; use one of {', '.join(get_args(Rule))}")

    def exit_layers(self, n_layers: int) -> tuple[int, ...]:
        """Returns the exits of a stack, as numbers of layers.

        Raises:
          ConfigError: an exit is not inside the stack.
        """
        exits = tuple(range(1, n_layers)) if self.exits is None else self.exits
        for n in exits:
            check_exit("exit.exits", n, n_layers)
        return exits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExitProbe:
    """A logistic regression for each exit, on the normalised state.

    Attributes:
      kernel_ed: (layers - 1, d_model).
      bias_e: (layers - 1,).
    """

    kernel_ed: Array
    bias_e: Array

    def __call__(self, hidden: Array, n_layers_passed: int) -> Array:
        """(..., d_model) -> (...) float32, logits of the last layer choosing the same token."""
        kernel_d, bias = self.kernel_ed[n_layers_passed - 1], self.bias_e[n_layers_passed - 1]
        # Highest precision, as for routers (``ops.routing.router_logits``), because a token leaves or stays by it.
        return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), kernel_d, precision="highest") + bias


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExitState:
    """State of tokens between layers.

    Attributes:
      x_btd: residual stream.
      done_bt: bool, whether the token has left.
      layers_bt: int32, number of layers that were computed for the token.
    """

    x_btd: Array
    done_bt: Array
    layers_bt: Array


def check_exit(name: str, n_layers_passed: int, n_layers: int) -> None:
    """Raises ``ConfigError`` if there is no exit after this number of layers."""
    if not 1 <= n_layers_passed < n_layers:
        raise ConfigError(f"{name} is {n_layers_passed} and the model has {n_layers} layers; give 1 to {n_layers - 1}")


def check_layers(config: ModelConfig, technique: str) -> None:
    """Raises ``ConfigError`` for a stack with a depth policy of its own."""
    for i, block in enumerate(config.layers):
        if not block.depth.every_token:
            raise ConfigError(
                f"{technique} needs a stack of blocks that every token passes once, and layer {i} has "
                f"{type(block.depth).__name__}; such a model already skips layers; remove {technique}"
            )


def confidence(
    model: Decoder, rule: Rule, probe: ExitProbe | None, before_btd: Array, x_btd: Array, n_layers_passed: int
) -> Array:
    """(batch, length) float32 of at most 1: confidence of the state after a layer; see ``ConfidenceExit``."""
    if rule == "similarity":
        a, b = before_btd.astype(jnp.float32), x_btd.astype(jnp.float32)
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        return (a * b).sum(-1) / jnp.maximum(norms, 1e-9)
    if rule == "gap":
        p_btv = jax.nn.softmax(model.exit_logits(x_btd))
        # Not top_k, which sorts the whole vocabulary on CPU and is far slower.
        others_btv = jnp.where(jnp.arange(p_btv.shape[-1]) == p_btv.argmax(-1, keepdims=True), 0, p_btv)
        return p_btv.max(-1) - others_btv.max(-1)
    if probe is None:
        raise ConfigError("exit.rule is 'probe' and no probe was given; efftrain calibrate-depth RUN trains one")
    return jax.nn.sigmoid(probe(model.norm(x_btd), n_layers_passed))


def start(x_btd: Array, done_bt: Array | None = None) -> ExitState:
    """Returns the state before the first layer; ``done_bt``: tokens for which nothing needs to be computed."""
    shape = x_btd.shape[:2]
    done_bt = jnp.zeros(shape, bool) if done_bt is None else done_bt
    return ExitState(x_btd, done_bt, jnp.zeros(shape, jnp.int32))


def advance(
    model: Decoder,
    exits: Sequence[int],
    rule: Rule,
    state: ExitState,
    y_btd: Array,
    n_layers_passed: int,
    *,
    threshold: Array | float,
    probe: ExitProbe | None = None,
    max_layers_b: Array | None = None,
) -> ExitState:
    """Returns the state after a layer, whose output is ``y_btd``; tokens that are done keep their state.

    Args:
      model: the model of the layer.
      exits: numbers of layers after which a token may leave.
      rule: measure of the confidence.
      state: state before the layer.
      y_btd: output of the layer for ``state.x_btd``.
      n_layers_passed: number of layers up to this one.
      threshold: a token leaves if its confidence is at least this.
      probe: the probe of the rule "probe".
      max_layers_b: (batch,) largest number of layers of each row. None: all layers.
    """
    x_btd = jnp.where(state.done_bt[..., None], state.x_btd, y_btd)
    done_bt = state.done_bt
    if n_layers_passed in exits:
        done_bt |= confidence(model, rule, probe, state.x_btd, x_btd, n_layers_passed) >= threshold
    if max_layers_b is not None:
        done_bt |= n_layers_passed >= max_layers_b[:, None]
    return ExitState(x_btd, done_bt, state.layers_bt + ~state.done_bt)


def exit_states(
    model: Decoder,
    tokens_bt: Array,
    exit: ConfidenceExit,
    threshold: Array | float,
    *,
    probe: ExitProbe | None = None,
    segments_bt: Array | None = None,
    positions_bt: Array | None = None,
) -> ExitState:
    """Computes whole rows in which each token exits by its own confidence, as in decoding; every layer is computed.

    Args:
      model: a model whose layers every token can pass.
      tokens_bt, segments_bt, positions_bt: see ``Decoder.states``.
      exit: rule and exits; its threshold is ignored.
      threshold: () may be traced, so that a curve over thresholds compiles once.
      probe: the probe of the rule "probe".
    """
    exits = exit.exit_layers(model.config.n_layers)
    if positions_bt is None:
        positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
    state = start(model.embed(tokens_bt, positions_bt))
    for i, layer in enumerate(model.layers()):
        y_btd, _ = layer(state.x_btd, positions_bt, segments_bt, tokens_bt)
        state = advance(model, exits, exit.rule, state, y_btd, i + 1, threshold=threshold, probe=probe)
    return state


def extend_until_sure(
    model: Decoder,
    layers: Sequence[Block],
    x_btd: Array,
    positions_bt: Array,
    caches: Sequence[Any],
    advance_by: partial,
    done_bt: Array | None = None,
    tokens_bt: Array | None = None,
) -> tuple[ExitState, tuple[Any, ...]]:
    """Computes new tokens layer by layer until all of them are done; later layers only write them to their caches.

    Args:
      model: the decoder.
      layers: its layers.
      x_btd: (batch, new tokens, d_model), embedded.
      positions_bt: (batch, new tokens).
      caches: the caches of the layers.
      advance_by: ``advance`` with all arguments bound, except the state, the output of the layer and the number of
        layers.
      done_bt: tokens for which nothing needs to be computed. None: all are computed.
      tokens_bt: (batch, new tokens) ids, for layers that read them.
    """
    state, after = start(x_btd, done_bt), []
    for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        # Outside the condition, within which XLA would copy the cache.
        cache = layer.write_cache(state.x_btd, positions_bt, cache)
        after.append(cache)

        def compute(state: ExitState, layer=layer, cache=cache, n=i + 1) -> ExitState:
            return advance_by(state, layer.attend_cached(state.x_btd, positions_bt, cache, tokens_bt=tokens_bt), n)

        state = jax.lax.cond(state.done_bt.all(), lambda state: state, compute, state)
    return state, tuple(after)


def fit_exit_probe(hidden_end: Array, agree_en: Array, *, steps: int = 300, rate: float = 0.05) -> ExitProbe:
    """Trains the probe of every exit; the model itself is not changed.

    Args:
      hidden_end: (exits, tokens, d_model) normalised states after each layer but the last.
      agree_en: (exits, tokens) bool, whether the exit would choose the last layer's token.
      steps, rate: number of steps and learning rate of Adam, on all tokens at once.
    """
    import optax

    optimizer = optax.adam(rate)
    probe = ExitProbe(jnp.zeros((len(hidden_end), hidden_end.shape[-1])), jnp.zeros(len(hidden_end)))

    def loss_of(probe: ExitProbe) -> Array:
        product_en = jnp.einsum("end,ed->en", hidden_end.astype(jnp.float32), probe.kernel_ed, precision="highest")
        logits_en = product_en + probe.bias_e[:, None]
        return optax.losses.sigmoid_binary_cross_entropy(logits_en, agree_en.astype(jnp.float32)).mean(1).sum()

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        probe, state = carry
        updates, state = optimizer.update(jax.grad(loss_of)(probe), state)
        return (optax.apply_updates(probe, updates), state), None

    state = optimizer.init(probe)  # ty: ignore[invalid-argument-type]  # any pytree, which chex's ArrayTree does not say
    return jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps)[0][0])((probe, state))
