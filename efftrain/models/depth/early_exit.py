"""Tokens that leave the stack when they are sure: exits by confidence, with full caches behind them.

A token that left after some layers keeps its state for all later ones: they compute its keys and values, which later
tokens need, and nothing else. Whole rows can be computed at once with the same result (``exit_states``), since what a
layer sees of a token depends on no later layer.

Source: Schuster et al. 2022 (CALM); the keys and values of skipped layers as there, from the state at the exit.
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
    """When a token has had enough layers.

    Attributes:
      rule: what measures the confidence, 1 at most. "gap": the probability of the likeliest token less that of the
        second, which costs a head at every exit; "similarity": cosine of the state before and behind a layer; "probe":
        a logistic regression on the state, trained to tell whether the last layer would choose the same token.
      threshold: a token leaves where its confidence is at least this. Above 1: only where ``limit_b`` ends it.
      exits: numbers of layers after which a token may leave. None: after every layer.
    """

    rule: Rule = "gap"
    threshold: float = 0.9
    exits: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.rule not in get_args(Rule):
            raise ConfigError(f"exit.rule is {self.rule!r}; use one of {', '.join(get_args(Rule))}")

    def places(self, n_layers: int) -> tuple[int, ...]:
        """The exits of a stack, as numbers of layers.

        Raises:
          ConfigError: an exit that is not inside of the stack.
        """
        exits = tuple(range(1, n_layers)) if self.exits is None else self.exits
        for n in exits:
            check_exit("exit.exits", n, n_layers)
        return exits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExitProbe:
    """A logistic regression for each exit, on the normalised state: kernel_ed (layers - 1, d_model), bias_e."""

    kernel_ed: Array
    bias_e: Array

    def __call__(self, hidden: Array, n_layers_passed: int) -> Array:
        """(..., d_model) -> (...) float32 logits that the last layer would choose the same token."""
        kernel_d, bias = self.kernel_ed[n_layers_passed - 1], self.bias_e[n_layers_passed - 1]
        # As routers, see ``ops.routing.router_logits``: a token leaves or stays by it.
        return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), kernel_d, precision="highest") + bias


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExitState:
    """Tokens on their way up.

    Attributes:
      x_btd: the stream.
      done_bt: bool, has left.
      layers_bt: int32, layers that were computed.
    """

    x_btd: Array
    done_bt: Array
    layers_bt: Array


def check_exit(name: str, n_layers_passed: int, n_layers: int) -> None:
    """Raises ``ConfigError`` where there is no exit behind so many layers."""
    if not 1 <= n_layers_passed < n_layers:
        raise ConfigError(
            f"{name} is {n_layers_passed} and the model has {n_layers} layers; an exit stands behind 1 to "
            f"{n_layers - 1}"
        )


def check_layers(config: ModelConfig, technique: str) -> None:
    """Raises ``ConfigError`` for a stack that has a depth policy of its own."""
    for i, block in enumerate(config.layers):
        if not block.depth.every_token:
            raise ConfigError(
                f"{technique} needs a stack of blocks that every token passes once, and layer {i} has "
                f"{type(block.depth).__name__}; such a model saves its layers by itself, leave {technique} out"
            )


def confidence(
    model: Decoder, rule: Rule, probe: ExitProbe | None, before_btd: Array, x_btd: Array, n_layers_passed: int
) -> Array:
    """(batch, length) float32, 1 at most: how sure the state behind a layer is; see ``ConfidenceExit``."""
    if rule == "similarity":
        a, b = before_btd.astype(jnp.float32), x_btd.astype(jnp.float32)
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        return (a * b).sum(-1) / jnp.maximum(norms, 1e-9)
    if rule == "gap":
        p_btv = jax.nn.softmax(model.exit_logits(x_btd))
        # Not top_k, which sorts the vocabulary on CPU: 40 times slower.
        others_btv = jnp.where(jnp.arange(p_btv.shape[-1]) == p_btv.argmax(-1, keepdims=True), 0, p_btv)
        return p_btv.max(-1) - others_btv.max(-1)
    if probe is None:
        raise ConfigError("exit.rule is 'probe' and no probe was given; efftrain calibrate-depth RUN trains one")
    return jax.nn.sigmoid(probe(model.norm(x_btd), n_layers_passed))


def start(x_btd: Array, done_bt: Array | None = None) -> ExitState:
    """Before the first layer; ``done_bt``: tokens for which nothing is to be computed."""
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
    limit_b: Array | None = None,
) -> ExitState:
    """A layer later: ``y_btd`` is what it made of ``state.x_btd``; tokens that are done keep what they had."""
    x_btd = jnp.where(state.done_bt[..., None], state.x_btd, y_btd)
    done_bt = state.done_bt
    if n_layers_passed in exits:
        done_bt |= confidence(model, rule, probe, state.x_btd, x_btd, n_layers_passed) >= threshold
    if limit_b is not None:
        done_bt |= n_layers_passed >= limit_b[:, None]
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
    """Whole rows, each token by its own confidence, as decoding would compute them; every layer is computed.

    Args:
      model: whose layers every token can pass.
      tokens_bt, segments_bt, positions_bt: see ``Decoder.states``.
      exit: rule and exits; its threshold is not read.
      threshold: () may be traced, so that a curve compiles once.
      probe: of the rule "probe".
    """
    exits = exit.places(model.config.n_layers)
    if positions_bt is None:
        positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
    state = start(model.embedding(tokens_bt))
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
    """New tokens through the layers until all of them are done; later layers only write them to the cache.

    Args:
      x_btd: (batch, new tokens, d_model), embedded.
      positions_bt: (batch, new tokens).
      caches: of the layers.
      advance_by: ``advance`` but for the state, what the layer made of it, and the number of layers.
      done_bt: tokens for which nothing is to be computed. None: none.
      tokens_bt: (batch, new tokens) ids, for layers that read them.
    """
    state, after = start(x_btd, done_bt), []
    for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        # Outside of the condition, in which XLA would copy the cache.
        cache = layer.write_cache(state.x_btd, positions_bt, cache)
        after.append(cache)

        def compute(state: ExitState, layer=layer, cache=cache, n=i + 1) -> ExitState:
            return advance_by(state, layer.attend_cached(state.x_btd, positions_bt, cache, tokens_bt=tokens_bt), n)

        state = jax.lax.cond(state.done_bt.all(), lambda state: state, compute, state)
    return state, tuple(after)


def fit_exit_probe(hidden_end: Array, agree_en: Array, *, steps: int = 300, rate: float = 0.05) -> ExitProbe:
    """Trains the probe of every exit; the model stays as it is.

    Args:
      hidden_end: (exits, tokens, d_model) normalised states behind each layer but the last.
      agree_en: (exits, tokens) bool, whether the exit would choose the last layer's token.
      steps, rate: of Adam on all tokens at once.
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

    return jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps)[0][0])((probe, optimizer.init(probe)))
