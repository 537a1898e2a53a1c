"""The layer stack: how layers are stored, and in which order and how often they are computed."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.config import LayerDropout
from efftrain.ops.platform import conditional
from efftrain.sharding.layout import is_variable

LayerT = TypeVar("LayerT", bound=nnx.Module)
Policy = Callable[..., bool] | None
Carry = tuple[Array, Array | None]
REMAT: dict[str, Policy] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack_layers(build: Callable[[nnx.Rngs], LayerT], n: int, rngs: nnx.Rngs) -> LayerT:
    """Builds a module whose parameters hold ``n`` layers on a leading axis with the logical name ``layers``.

    Args:
      build: function that builds one layer.
      n: number of layers.
      rngs: a key is split off for each layer.
    """
    keys = jax.random.split(rngs.params(), n)
    layer_def, states = jax.vmap(lambda key: nnx.split(build(nnx.Rngs(params=key))))(keys)
    return nnx.merge(layer_def, jax.tree.map(_with_layer_axis(n), states, is_leaf=is_variable))


def _with_layer_axis(n: int):
    def add(variable: nnx.Variable) -> nnx.Variable:
        metadata = variable.get_metadata()
        if "axes" not in metadata:
            raise ConfigError(
                f"a {type(variable).__name__} of shape {variable.shape[1:]} of a layer does not name its axes; make it "
                "nnx.Param(value, axes=(...)), with a logical axis or None for each dimension"
            )
        units = metadata.get("units", variable.shape[1:])
        return variable.replace(axes=("layers", *metadata["axes"]), units=(n, *units))

    return add


def _without_layer_axis(variable: nnx.Variable) -> nnx.Variable:
    metadata = variable.get_metadata()
    return variable.replace(axes=metadata["axes"][1:], units=metadata["units"][1:])


def unstack(state: nnx.State, n: int) -> list[nnx.State]:
    """Returns the states of the single layers.

    It uses ``lax.split`` instead of indexing, because the gradient of a split is one concatenation, and that of n
    slices is n padded arrays and their sum.
    """
    leaves, tree = jax.tree.flatten(state)
    pieces = [[jnp.squeeze(p, 0) for p in jax.lax.split(leaf, [1] * n, axis=0)] for leaf in leaves]
    layers = [jax.tree.unflatten(tree, layer) for layer in zip(*pieces, strict=True)]
    return jax.tree.map(_without_layer_axis, layers, is_leaf=is_variable)


def run_layers(
    stacks: Sequence[LayerT],
    x_btd: Array,
    apply: Callable[[LayerT, Array], tuple[Array, dict]],
    *,
    n_repeats: int,
    scan: bool,
    remat: str,
    kept: Array | None = None,
    exits_e: Array | None = None,
) -> tuple[Array, Array | None, dict]:
    """Computes every layer once, in order: the pattern, ``n_repeats`` times.

    Args:
      stacks: one stacked module for each position of the pattern.
      x_btd: (batch, length, d_model).
      apply: (layer, x) -> (x, metrics). Metrics are summed over layers: (sum, count) pairs, the scalar ``auxiliary``,
        which is added to the loss, and ``statistics``, a dict that is stacked over the repeats instead.
      n_repeats, scan, remat: see ``ModelConfig``.
      kept: bool, the layers that are computed: (layers,), or (layers, batch) for each row. None: all.
      exits_e: (e,) integers, indices of the layers after which x is returned too. None: no other layers.

    Returns:
      x; x after the layers of ``exits_e`` (e, batch, length, d_model), or None; and the metrics. If a layer has
      ``statistics``, they are a list with one dict of (n_repeats, ...) arrays for each position of the pattern.
    """
    split = [nnx.split(stack) for stack in stacks]
    n_positions = len(split)

    def repeat(carry: Carry, inputs: tuple[Sequence[nnx.State], Array | int]) -> tuple[Carry, tuple[dict, list[dict]]]:
        (x, exit_ebtd), (layers, number) = carry, inputs
        metrics, statistics = {}, []
        for position, ((layer_def, _), state) in enumerate(zip(split, layers, strict=True)):
            i = number * n_positions + position

            def run(state: nnx.State, x: Array, layer_def=layer_def) -> tuple[Array, dict]:
                return apply(nnx.merge(layer_def, state), x)

            x, more = run(state, x) if kept is None else _run_or_keep(run, kept[i], state, x)
            if exits_e is not None and exit_ebtd is not None:
                exit_ebtd = jnp.where((exits_e == i)[:, None, None, None], x, exit_ebtd)
            statistics.append(more.get("statistics", {}))
            metrics = add_metrics(metrics, {name: value for name, value in more.items() if name != "statistics"})
        return (x, exit_ebtd), (metrics, statistics)

    run_once = repeat if remat == "none" else jax.checkpoint(repeat, policy=REMAT[remat], prevent_cse=not scan)
    carry: Carry = x_btd, None if exits_e is None else jnp.zeros((len(exits_e), *x_btd.shape), x_btd.dtype)
    numbers = jnp.arange(n_repeats)
    if scan:
        carry, (stacked, statistics) = jax.lax.scan(run_once, carry, ([state for _, state in split], numbers))
        return *carry, _with_statistics(jax.tree.map(lambda a: a.sum(0), stacked), statistics)
    metrics, found = {}, []
    unstacked = zip(*(unstack(state, n_repeats) for _, state in split), strict=True)
    for number, layers in enumerate(unstacked):
        carry, (more, statistics) = run_once(carry, (layers, number))
        metrics = add_metrics(metrics, more)
        found.append(statistics)
    x_btd, exit_ebtd = carry
    return x_btd, exit_ebtd, _with_statistics(metrics, jax.tree.map(lambda *layers: jnp.stack(layers), *found))


def _run_or_keep(run: Callable, kept: Array, state: nnx.State, x_btd: Array) -> tuple[Array, dict]:
    """Computes the layer where ``kept``, () or (batch,), else keeps x. () and False: costs nothing, no metrics."""
    if kept.ndim:
        y_btd, metrics = run(state, x_btd)
        return jnp.where(kept[:, None, None], y_btd, x_btd), metrics
    metrics = jax.eval_shape(run, state, x_btd)[1]

    def keep(_: nnx.State, x_btd: Array) -> tuple[Array, dict]:
        return x_btd, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), metrics)

    return conditional(kept, run, keep, state, x_btd)


def dropout_rates(n_layers: int, rate: float, strength: Array | float) -> Array:
    """Returns (layers,) probabilities of skipping each layer: 0 for the first, ``rate * strength`` for the last.

    Args:
      n_layers: number of layers of the stack.
      rate: probability for the last layer, at full strength.
      strength: () from 0 to 1.

    Source: Elhoushi et al. 2024 (LayerSkip), equation 1.
    """
    depth_l = jnp.arange(n_layers) / max(n_layers - 1, 1)
    return strength * rate * (jnp.exp2(depth_l) - 1)


def dropout_strength(step: Array | int, after: int, ramp_steps: int) -> Array:
    """Strength of layer dropout at a step: 0 before ``after``, then growing to 1 over ``ramp_steps`` (0: at once).

    Source: Elhoushi et al. 2024 (LayerSkip), section 4.1, where the ramp is the whole run.
    """
    if not ramp_steps:
        return jnp.where(jnp.asarray(step) < after, 0.0, 1.0)
    return jnp.exp2(jnp.clip((step - after) / ramp_steps, 0.0, 1.0)) - 1


def mean_kept(n_layers: int, dropout: LayerDropout, steps: int) -> float:
    """Share of the layers that a run of ``steps`` steps computes, on average over layers and steps."""
    if not dropout.rate or dropout.per_row:
        return 1.0
    strength = dropout_strength(jnp.arange(steps), dropout.after, dropout.ramp_steps).mean()
    return float(1 - dropout_rates(n_layers, dropout.rate, strength).mean())


def _with_statistics(metrics: dict, statistics: list[dict]) -> dict:
    return metrics | ({"statistics": statistics} if any(statistics) else {})


def add_metrics(left: dict, right: dict) -> dict:
    """Sums two dicts of (sum, count) pairs; a name that only one has is kept."""
    both = {k: jax.tree.map(jnp.add, left[k], right[k]) for k in left.keys() & right.keys()}
    return left | right | both
