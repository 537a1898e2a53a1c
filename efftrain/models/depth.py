"""The layer stack: how layers are stored, and in which order and how often they are computed."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

Policy = Callable[..., bool] | None
REMAT: dict[str, Policy] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack_layers(build: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """A module whose parameters hold ``n`` layers on a leading axis, logical name ``layers``.

    Args:
      build: makes one layer.
      n: how many.
      rngs: a key is split off for each layer.
    """
    layer_def, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    states = jax.vmap(lambda key: nnx.state(build(nnx.Rngs(params=key))))(jax.random.split(rngs.params(), n))
    return nnx.merge(layer_def, jax.tree.map(_with_layer_axis(n), states, is_leaf=_is_variable))


def _with_layer_axis(n: int):
    def add(variable: nnx.Variable) -> nnx.Variable:
        metadata = variable.get_metadata()
        axes, units = metadata["axes"], metadata["units"]
        return variable.replace(axes=("layers", *axes), units=(n, *units))

    return add


def _without_layer_axis(variable: nnx.Variable) -> nnx.Variable:
    metadata = variable.get_metadata()
    return variable.replace(axes=metadata["axes"][1:], units=metadata["units"][1:])


def _is_variable(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)


def unstack(state: nnx.State, n: int) -> list[nnx.State]:
    """The states of the single layers.

    ``lax.split`` and not indexing: its gradient is one concatenation, where that of n slices is n padded arrays and
    their sum.
    """
    leaves, tree = jax.tree.flatten(state)
    pieces = [[jnp.squeeze(p, 0) for p in jax.lax.split(leaf, [1] * n, axis=0)] for leaf in leaves]
    layers = [jax.tree.unflatten(tree, layer) for layer in zip(*pieces, strict=True)]
    return jax.tree.map(_without_layer_axis, layers, is_leaf=_is_variable)


def run_layers(
    stacks: Sequence[nnx.Module],
    x_btd: Array,
    apply: Callable[[nnx.Module, Array], tuple[Array, dict]],
    *,
    n_repeats: int,
    scan: bool,
    remat: str,
) -> tuple[Array, dict]:
    """Every layer once, in order: the pattern, ``n_repeats`` times.

    Args:
      stacks: one stacked module for each position of the pattern.
      x_btd: (batch, length, d_model).
      apply: (layer, x) -> (x, metrics). Metrics are summed over layers: (sum, count) pairs, the scalar ``auxiliary``,
        which is added to the loss, and ``statistics``, a dict that is stacked over the repeats instead.
      n_repeats, scan, remat: see ``ModelConfig``.

    Returns:
      x and the metrics. Their ``statistics``, where a layer has any, is a list with one dict of (n_repeats, ...) arrays
      for each position of the pattern.
    """
    split = [nnx.split(stack) for stack in stacks]

    def repeat(x: Array, layers: Sequence[nnx.State]) -> tuple[Array, tuple[dict, list[dict]]]:
        metrics, statistics = {}, []
        for (layer_def, _), state in zip(split, layers, strict=True):
            x, more = apply(nnx.merge(layer_def, state), x)
            statistics.append(more.get("statistics", {}))
            metrics = add_metrics(metrics, {name: value for name, value in more.items() if name != "statistics"})
        return x, (metrics, statistics)

    if remat != "none":
        repeat = jax.checkpoint(repeat, policy=REMAT[remat], prevent_cse=not scan)
    if scan:
        x_btd, (stacked, statistics) = jax.lax.scan(repeat, x_btd, [state for _, state in split])
        return x_btd, _with_statistics(jax.tree.map(lambda a: a.sum(0), stacked), statistics)
    metrics, found = {}, []
    for layers in zip(*(unstack(state, n_repeats) for _, state in split), strict=True):
        x_btd, (more, statistics) = repeat(x_btd, layers)
        metrics = add_metrics(metrics, more)
        found.append(statistics)
    return x_btd, _with_statistics(metrics, jax.tree.map(lambda *layers: jnp.stack(layers), *found))


def _with_statistics(metrics: dict, statistics: list[dict]) -> dict:
    return metrics | ({"statistics": statistics} if any(statistics) else {})


def add_metrics(left: dict, right: dict) -> dict:
    """Sums two dicts of (sum, count) pairs; a name that only one has is kept."""
    both = {k: jax.tree.map(jnp.add, left[k], right[k]) for k in left.keys() & right.keys()}
    return left | right | both
