"""Optimizers against optax on plain matrices, layer by layer: what a stacked model must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import MODEL

from efftrain.errors import ConfigError
from efftrain.models.decoder import Decoder
from efftrain.sharding.layout import state_shardings
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.optimizers import AdamW, Muon, with_clipping
from efftrain.train.schedules import WarmupStableDecay

N_STEPS = 3


@pytest.fixture(scope="module")
def params() -> nnx.State:
    state = nnx.state(Decoder(MODEL.replace(n_repeats=3), rngs=nnx.Rngs(0)), nnx.Param)
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), state)


@pytest.fixture(scope="module")
def gradients(params) -> list[nnx.State]:
    """One of each step; every leaf of every step its own."""
    leaves, tree = jax.tree.flatten(params)
    draw = np.random.default_rng(0)
    return [
        tree.unflatten([jnp.asarray(draw.normal(size=p.shape), jnp.float32) for p in leaves]) for _ in range(N_STEPS)
    ]


def apart(state: nnx.State) -> dict[str, np.ndarray]:
    """Plain arrays by name, those of the layers one by one."""
    flat = {}
    for name, array in flatten(state).items():
        if name.startswith("blocks/"):
            flat |= {f"{name}[{i}]": np.asarray(array[i]) for i in range(array.shape[0])}
        else:
            flat[name] = np.asarray(array)
    return flat


def run(optimizer: optax.GradientTransformation, params, gradients, *, transform=lambda tree: tree):
    """The parameters after all gradients."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = transform(params)
    state = jax.jit(optimizer.init)(params)
    for gradient in gradients:
        params, state = step(params, state, transform(gradient))
    return params


def is_table(name: str) -> bool:
    return name.startswith(("embedding", "head"))


def test_adamw_equals_optax_on_the_layers_apart(params, gradients):
    factor = WarmupStableDecay(warmup=0.5, decay=0.5).build(6)
    config = AdamW(peak_lr=0.02, b1=0.8, b2=0.9, weight_decay=0.3)
    by_hand = optax.adamw(
        lambda step: 0.02 * factor(step),
        b1=0.8,
        b2=0.9,
        weight_decay=0.3,
        mask=lambda tree: jax.tree.map(lambda p: p.ndim == 2, tree),
    )
    got = apart(run(config.build(factor), params, gradients))
    want = run(by_hand, params, gradients, transform=apart)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("config", [AdamW(peak_lr=0.5, weight_decay=0.1), Muon(peak_lr=0.5, weight_decay=0.1)])
def test_only_matrices_decay(params, config):
    """With no gradient the decay is all that is left: p - lr * decay * p."""
    still = [jax.tree.map(jnp.zeros_like, params)]
    before, after = apart(params), apart(run(config.build(lambda step: 1.0), params, still))
    for name, p in before.items():
        want = p * (1 - 0.5 * 0.1) if p.ndim == 2 else p
        np.testing.assert_allclose(after[name], want, atol=1e-6, err_msg=name)
    assert {name.rpartition("/")[2][:5] for name, p in before.items() if p.ndim == 1} == {"scale"}


def test_muon_gives_a_stacked_weight_the_update_of_its_layers_apart(params, gradients):
    """The trap: a 3-D weight that is flattened, taken as one matrix, or quietly left to Adam."""
    config = Muon(peak_lr=0.02, momentum=0.9, weight_decay=0.1)
    by_hand = optax.contrib.muon(0.02, beta=0.9, weight_decay=0.1, consistent_rms=0.2)
    got = apart(run(config.build(lambda step: 1.0), params, gradients))
    layers = [name for name, p in got.items() if p.ndim == 2 and not is_table(name)]
    assert len(layers) == 3 * 7  # query, key, value, out, gate, up, down of three layers

    def pick(tree):
        return {name: p for name, p in apart(tree).items() if name in layers}

    want = run(by_hand, params, gradients, transform=pick)
    for name in layers:
        np.testing.assert_allclose(got[name], want[name], atol=2e-5, err_msg=name)


def test_muon_leaves_tables_and_norms_to_plain_adam(params, gradients):
    muon, adam = Muon(peak_lr=0.02, b1=0.8, b2=0.9), AdamW(peak_lr=0.02, b1=0.8, b2=0.9)
    got, want = (apart(run(c.build(lambda step: 1.0), params, gradients)) for c in (muon, adam))
    others = [name for name, p in got.items() if p.ndim == 1 or is_table(name)]
    assert others
    for name in others:
        np.testing.assert_allclose(got[name], want[name], atol=1e-6, err_msg=name)


def test_muon_updates_are_nearly_orthogonal_and_of_adams_size(params, gradients):
    """All singular values of an update near one value; its root mean square near 0.2 (Moonlight, section 2.2)."""
    config = Muon(peak_lr=1.0, weight_decay=0.0)
    before, after = apart(params), apart(run(config.build(lambda step: 1.0), params, gradients[:1]))
    for name, p in before.items():
        if p.ndim == 2 and not is_table(name):
            update = after[name] - p
            values = np.linalg.svd(update / (0.2 * np.sqrt(max(p.shape))), compute_uv=False)
            assert 0.6 < values.min() <= values.max() < 1.3, (name, values)
            assert 0.14 < np.sqrt(np.mean(update**2)) < 0.26, name


def test_muon_on_eight_devices_equals_one(params, gradients):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    optimizer = Muon(peak_lr=0.02).build(lambda step: 1.0)
    spread = run(optimizer, params, gradients, transform=lambda tree: jax.device_put(tree, state_shardings(tree, mesh)))
    up = flatten(spread)["blocks/0/mlp/up/kernel"]
    assert up.addressable_shards[0].data.size == up.size // 8
    for name, want in apart(run(optimizer, params, gradients)).items():
        np.testing.assert_allclose(apart(spread)[name], want, atol=1e-5, err_msg=name)


def test_clipping_scales_the_gradient_to_the_norm():
    tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clipped = with_clipping(optax.identity(), 1.0)
    updates, _ = clipped.update(tree, clipped.init(tree))
    np.testing.assert_allclose(updates["a"], [0.6, 0.0], atol=1e-6)
    np.testing.assert_allclose(updates["b"], [[0.8]], atol=1e-6)
    loose = with_clipping(optax.identity(), 6.0)
    np.testing.assert_array_equal(loose.update(tree, loose.init(tree))[0]["a"], tree["a"])
    assert with_clipping(optax.identity(), None).init(tree) == optax.identity().init(tree)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: AdamW(peak_lr=0.0), "peak_lr"),
        (lambda: AdamW(peak_lr=float("nan")), "peak_lr"),
        (lambda: AdamW(weight_decay=-1.0), "weight_decay"),
        (lambda: AdamW(b2=1.0), "b2"),
        (lambda: Muon(momentum=-0.1), "momentum"),
    ],
)
def test_an_impossible_optimizer_is_named(build, field):
    with pytest.raises(ConfigError, match=rf"optimizer\.{field}"):
        build()
