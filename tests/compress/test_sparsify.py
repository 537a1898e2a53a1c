"""Sparse training: which weights stay, when, that zeros are exact, and that masks survive what happens to a run."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from tiny_models import build, config

import efftrain
from efftrain.compress.pruning.scores import Magnitude, RigL, Saliency
from efftrain.compress.pruning.sparsify import Sparsity, hold_zeros, new_masks, sparsify
from efftrain.compress.pruning.sparsity_schedules import Constant, ErdosRenyi, Global, Gradual, Iterative, OneShot
from efftrain.errors import ConfigError, RunError
from efftrain.models.moe import MoE
from efftrain.models.quantization import matrices
from efftrain.ops.masks import Blocks, SemiStructured, Unstructured, keep_highest, pack_bits, unpack_bits
from efftrain.train.optimizers import AdamW, Muon
from efftrain.train.schedules import Cosine

HALF = Unstructured(sparsity=0.5)
STEPS = 10


def stacked(model: nnx.Module) -> dict[str, np.ndarray]:
    """Matrices of blocks (layers, ..., d_in, d_out)."""
    return {name: np.asarray(getattr(m, a)[...]) for name, m, a in matrices(model) if name.startswith("blocks/")}


def run(sparsity: Sparsity, steps: int = STEPS, inner=None, model=None, gradient=None):
    """Parameters and states of so many updates, by made-up gradients that depend on the step and the weights."""
    graph, params, rest = nnx.split(model or build(config()), nnx.Param, ...)
    optimizer = sparsify(inner or optax.sgd(0.1), sparsity, STEPS)
    state, history = optimizer.init(params), []

    def made_up(step, params):
        key = jax.random.fold_in(jax.random.key(1), step)
        leaves, tree = jax.tree.flatten(params)
        noise = [jax.random.normal(jax.random.fold_in(key, i), a.shape) for i, a in enumerate(leaves)]
        return jax.tree.map(lambda n, w: n + 0.1 * w, jax.tree.unflatten(tree, noise), params)

    @jax.jit
    def step(number, params, state):
        updates, state = optimizer.update((gradient or made_up)(number, params), state, params)
        return optax.apply_updates(params, updates), state

    for number in range(steps):
        params, state = step(number, params, state)
        history.append((nnx.merge(graph, params, rest), state))
    return history


@pytest.mark.parametrize("n_keep", [0, 1, 5, 12])
def test_exactly_so_many_stay_and_of_equal_ones_the_first(n_keep):
    scores = np.random.default_rng(0).integers(0, 3, (4, 12)).astype(np.float32)  # mostly ties
    mask = np.asarray(keep_highest(jnp.asarray(scores), n_keep))
    for row, kept in zip(scores, mask, strict=True):
        want = sorted(range(12), key=lambda i: (-row[i], i))[:n_keep]
        assert sorted(np.flatnonzero(kept)) == sorted(want)


def test_bits_hold_a_mask_of_any_length():
    mask = np.random.default_rng(0).random((3, 13, 5)) < 0.5
    for axis, size in ((1, 2), (2, 1)):
        packed = pack_bits(jnp.asarray(mask), axis)
        assert packed.shape[axis] == size
        assert packed.dtype == jnp.uint8
        np.testing.assert_array_equal(unpack_bits(packed, mask.shape[axis], axis), mask)


@pytest.mark.parametrize(
    ("score", "structure"),
    [
        (Magnitude(), HALF),
        (Magnitude(straight_through=True), Unstructured(sparsity=0.8)),
        (Saliency(), HALF),
        (Magnitude(), Blocks(sparsity=0.5, rows=4, columns=2)),
    ],
    ids=str,
)
def test_every_layer_loses_exactly_its_share_and_nothing_else(score, structure):
    model, state = run(Sparsity(structure=structure, score=score))[-1]
    for name, layers in stacked(model).items():
        for layer in layers:
            size = structure.rows * structure.columns if isinstance(structure, Blocks) else 1
            assert np.count_nonzero(layer) == round((1 - structure.sparsity) * layer.size / size) * size, name
            if size > 1:
                parts = np.abs(layer).reshape(layer.shape[0] // 4, 4, layer.shape[1] // 2, 2).transpose(0, 2, 1, 3)
                assert set(np.count_nonzero(parts.reshape(-1, 8), axis=1)) == {0, 8}
    assert np.count_nonzero(model.embedding.table[...]) == model.embedding.table.size
    assert np.count_nonzero(model.head.kernel[...]) == model.head.kernel.size
    bits = sum(mask.size for mask in state.masks.values())
    n = sum(layers.size for layers in stacked(model).values())
    assert n / 8 <= bits < 1.1 * n / 8  # an axis of 12 takes two bytes


def test_two_of_four_inputs_stay_for_each_output_and_they_are_the_largest():
    before, _ = run(Sparsity(structure=SemiStructured(n=2, m=4), schedule=OneShot(at=0.5)), steps=5)[-1]
    history = run(Sparsity(structure=SemiStructured(n=2, m=4), schedule=OneShot(at=0.5)), inner=optax.sgd(0.0), steps=6)
    for name, layers in stacked(history[-1][0]).items():
        groups = layers.reshape(len(layers), -1, 4, layers.shape[-1])
        assert (np.count_nonzero(groups, axis=2) == 2).all(), name
        dense = np.abs(stacked(build(config()))[name]).reshape(groups.shape)
        smallest_kept = np.where(groups != 0, dense, np.inf).min(2)
        largest_gone = np.where(groups == 0, dense, -np.inf).max(2)
        assert (smallest_kept >= largest_gone).all(), name
    assert all(np.count_nonzero(layers) == layers.size for layers in stacked(before).values())  # not before its step


def test_sparsity_grows_by_the_cubic_and_then_stands_still():
    schedule = Gradual(start=0.2, end=0.8, updates=6)
    history = run(Sparsity(schedule=schedule))
    for step, (model, _) in enumerate(history):
        t = min(max((step - 2) / 6, 0), 1)
        for layers in stacked(model).values():
            for layer in layers:
                assert np.count_nonzero(layer) == round((1 - 0.5 * (1 - (1 - t) ** 3)) * layer.size)
    masks = [jax.tree.map(np.asarray, state.masks) for _, state in history]
    jax.tree.map(np.testing.assert_array_equal, masks[8], masks[9])


def test_n_of_m_grows_group_by_group():
    history = run(Sparsity(structure=SemiStructured(n=1, m=4), schedule=Gradual(start=0.0, end=0.9, updates=9)))
    kept = []
    for model, _ in history:
        layers = stacked(model)["blocks/0/mlp/up"]
        counts = np.count_nonzero(layers.reshape(len(layers), -1, 4, layers.shape[-1]), axis=2)
        assert len(set(counts.flat)) == 1
        kept.append(counts.flat[0])
    assert kept == sorted(kept, reverse=True)
    assert set(kept) == {1, 2, 3, 4}


def test_the_optimizer_sees_gradients_of_weights_that_are_used():
    """Against the same optimizer on theta, where the model reads mask * theta."""
    sparsity = Sparsity(schedule=OneShot(at=0.0))
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    (_, first), *_, (model, _) = run(sparsity, inner=inner)
    graph, theta, rest = nnx.split(build(config()), nnx.Param, ...)
    masks = {name: unpack_bits(m[...], m.shape[m.packed] * 8, m.packed) for name, m in first.masks.items()}

    def masked(params):
        model = nnx.merge(graph, params, rest)
        for name, module, attribute in list(matrices(model)):
            if name in masks:
                kernel = getattr(module, attribute)
                kernel[...] = kernel[...] * masks[name][..., : kernel.shape[-2], : kernel.shape[-1]]
        return nnx.state(model, nnx.Param)

    state, theta = inner.init(theta), masked(theta)
    dense_first = True
    for number in range(STEPS):
        key = jax.random.fold_in(jax.random.key(1), number)
        leaves, tree = jax.tree.flatten(theta)
        noise = [jax.random.normal(jax.random.fold_in(key, i), a.shape) for i, a in enumerate(leaves)]
        at = nnx.split(build(config()), nnx.Param, ...)[1] if dense_first else theta
        gradients = masked(jax.tree.map(lambda n, w: n + 0.1 * w, jax.tree.unflatten(tree, noise), at))
        updates, state = inner.update(gradients, state)
        theta, dense_first = masked(optax.apply_updates(theta, updates)), False
    for name, want in stacked(nnx.merge(graph, theta, rest)).items():
        np.testing.assert_allclose(stacked(model)[name], want, atol=1e-5)


def test_straight_through_trains_what_is_pruned_and_lets_it_come_back():
    """Against a plain loop: gradient at mask * latent, applied to the latent."""
    graph, params, rest = nnx.split(build(config()), nnx.Param, ...)
    sparsity = Sparsity(score=Magnitude(straight_through=True), schedule=Gradual(start=0.0, end=0.8, updates=8))

    def gradient(number, params):  # drives every weight towards a target of the other order
        return jax.tree.map(lambda w, target: w - target, params, jax.tree.map(lambda a: a[..., ::-1], initial))

    initial = params
    history = run(sparsity, gradient=gradient)
    latent = mask = stacked(nnx.merge(graph, params, rest))["blocks/0/mlp/down"]
    target, mask = latent[..., ::-1], np.ones_like(latent, bool)
    n_layer, came_back = latent[0].size, 0
    for step, (model, _) in enumerate(history):
        new = mask
        if step <= 8:
            t = min(step / 8, 1)
            n_keep = round((1 - 0.5 * (1 - (1 - t) ** 3)) * n_layer)
            order = np.argsort(-np.abs(latent).reshape(len(latent), -1), axis=1, kind="stable")
            new = np.zeros((len(latent), n_layer), bool)
            np.put_along_axis(new, order[:, :n_keep], True, axis=1)
            new = new.reshape(latent.shape)
            came_back += (new & ~mask).sum()
        weights = np.where(mask, latent, 0)
        latent = latent - 0.1 * (weights - target)
        mask = new
        np.testing.assert_allclose(stacked(model)["blocks/0/mlp/down"], np.where(mask, latent, 0), atol=1e-5)
    assert came_back > 0


def test_regrowth_keeps_the_number_and_starts_from_zero():
    for by in ("gradient", "random"):
        sparsity = Sparsity(score=RigL(by=by), schedule=Constant(start=0.0, end=0.8, updates=4))
        history = run(sparsity, inner=optax.sgd(0.0))
        counts, first = [], None
        for _, state in history:
            mask = state.masks["blocks/0/mlp/up"]
            bits = np.unpackbits(np.asarray(mask[...]), axis=mask.packed)
            counts.append(bits.sum())
            first = bits if first is None else first
        assert set(counts) == {first.size // 2}
        moved = (first != bits).sum()
        assert 0 < moved < first.size // 2
        # Nothing was trained: what came later is zero although it is used.
        grown = (bits > first)[..., : history[-1][0].blocks[0].mlp.up.kernel.shape[-1]]
        assert not np.asarray(history[-1][0].blocks[0].mlp.up.kernel[...])[grown].any()


def test_regrowth_by_the_gradient_grows_where_it_is_largest():
    params = nnx.state(build(config()), nnx.Param)
    sparsity = Sparsity(score=RigL(exchanged=0.5), schedule=Constant(start=0.0, end=0.8, updates=4))
    grown = jax.tree.map(lambda a: jnp.zeros_like(a).at[..., :1, :].set(100.0) if a.ndim > 2 else a, params)
    _, state = run(sparsity, inner=optax.sgd(0.0), gradient=lambda number, params: grown)[-1]
    mask = state.masks["blocks/0/mlp/up"]
    assert np.unpackbits(np.asarray(mask[...]), axis=mask.packed)[:, 0].all()


def test_rewinding_goes_back_to_the_weights_before_the_first_round():
    schedule = Iterative(start=0.2, end=0.8, rounds=3, rewind=True)
    history = run(Sparsity(schedule=schedule))
    before = stacked(history[1][0])["blocks/1/mlp/down"]
    densities = [0.5 ** (i / 3) for i in (1, 2, 3)]
    for step, density in zip((2, 5, 8), densities, strict=True):
        weights = stacked(history[step][0])["blocks/1/mlp/down"]
        assert np.count_nonzero(weights[0]) == round(density * weights[0].size)
        kept = weights != 0
        np.testing.assert_allclose(weights[kept], before[kept], rtol=1e-6)
        after = stacked(history[step + 1][0])["blocks/1/mlp/down"]
        assert np.abs(after[kept] - before[kept]).max() > 1e-3


def test_density_by_size_adds_up_to_the_target():
    shapes = {"wide": (4, 64, 256), "thin": (2, 64, 8), "small": (1, 8, 8)}
    found = ErdosRenyi().sparsities(shapes, 0.9)
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    assert sum(found[n] * sizes[n] for n in shapes) / sum(sizes.values()) == pytest.approx(0.9)
    assert found["small"] == 0.0  # would be denser than full
    assert found["wide"] > found["thin"]
    dense = {n: 1 - found[n] for n in ("wide", "thin")}
    assert dense["wide"] / dense["thin"] == pytest.approx(((64 + 256) / (64 * 256)) / ((64 + 8) / (64 * 8)))


def test_one_ranking_takes_from_small_weights_but_empties_no_matrix():
    model = build(config())
    small = model.blocks[0].mlp.up.kernel
    small[...] = small[...] * 1e-4
    sparsity = Sparsity(distribution=Global(max_sparsity=0.9), schedule=OneShot(at=0.0))
    pruned = stacked(run(sparsity, inner=optax.sgd(0.0), steps=1, model=model)[-1][0])
    total = sum(w.size for w in pruned.values())
    assert sum(np.count_nonzero(w) for w in pruned.values()) == round(0.5 * total)
    emptied = pruned["blocks/0/mlp/up"]
    for layer in emptied:
        assert np.count_nonzero(layer) == -(-layer.size // 10)
    rest = {n: w for n, w in pruned.items() if n != "blocks/0/mlp/up"}
    dense = stacked(build(config()))
    threshold = max(np.abs(dense[n][pruned[n] == 0]).max() for n in rest)
    assert threshold <= min(np.abs(w[w != 0]).min() for w in rest.values())


def test_one_ranking_is_over_more_weights_than_an_int32_counts():
    """Of shapes alone: 80 layers of 8192 x 28672, stacked, and what a schedule says on the way and at its end."""
    sparsity = Sparsity(distribution=Global(), schedule=Gradual())
    w = {name: jax.ShapeDtypeStruct((80, 8192, 28672), jnp.float32) for name in ("up", "down")}
    masks = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, bool), w)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    found = jax.eval_shape(partial(new_masks, sparsity, 100), w, w, masks, step)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(lambda a: (a.shape, a.dtype), masks)
    wide = {"up": jax.ShapeDtypeStruct((1, 1 << 16, 1 << 15), jnp.float32)}
    with pytest.raises(ConfigError, match="too many for one ranking; use n:m or blocks"):
        Unstructured().check("up", *wide["up"].shape[1:])


def test_experts_are_pruned_apart():
    model = tiny.MODEL.replace(
        pattern=(replace(tiny.MODEL.pattern[0], mlp=MoE(n_experts=4, d_expert=8, n_shared=1)),), scan=True
    )
    pruned = stacked(run(Sparsity(schedule=OneShot(at=0.0)), steps=2, model=build(model))[-1][0])
    experts = pruned["blocks/0/mlp/gate"]
    assert experts.ndim == 4
    assert (np.count_nonzero(experts, axis=(2, 3)) == experts[0, 0].size // 2).all()
    assert "blocks/0/mlp/router" not in pruned


PRUNED = Sparsity(schedule=Gradual(start=0.0, end=0.5, updates=4))


def trained(out: Path, sparsity: Sparsity = PRUNED, **changes):
    training = replace(tiny.TRAINING, **{k: v for k, v in changes.items() if hasattr(tiny.TRAINING, k)})
    return tiny.train(out, wrap=sparsity.around(training), **changes).model


def zeros(model: nnx.Module) -> dict[str, np.ndarray]:
    return {name: layers == 0 for name, layers in stacked(model).items()}


def test_masks_survive_a_restart_on_another_mesh(tmp_path):
    whole = trained(tmp_path / "whole")
    with pytest.raises(tiny.Crash):
        trained(tmp_path / "broken", batches=tiny.Walks(crash_at=6), devices=8)
    continued = trained(tmp_path / "broken", devices=1)
    tiny.assert_same_parameters(continued, whole, atol=1e-5)
    for name, gone in zeros(continued).items():
        assert gone.mean() == 0.5, name
        np.testing.assert_array_equal(gone, zeros(whole)[name])


def test_averages_and_micro_batches_have_the_same_zeros(tmp_path):
    averaged = trained(tmp_path, ema_decay=0.9, n_microbatches=2)  # the model is the averaged one
    loaded = efftrain.load(tmp_path)
    for name, gone in zeros(averaged).items():
        assert gone.mean() == 0.5, name
        np.testing.assert_array_equal(gone, zeros(loaded)[name])


@pytest.mark.parametrize("optimizer", [Muon(peak_lr=1e-2), AdamW(peak_lr=1e-2, b1=0.5)], ids=["muon", "adamw"])
def test_a_pruned_model_is_trained_on_with_another_optimizer(tmp_path, optimizer):
    pruned = trained(tmp_path / "pruned")
    tuned = trained(
        tmp_path / "tuned", hold_zeros(), optimizer=optimizer, initial=lambda: efftrain.load(tmp_path / "pruned")
    )
    for name, gone in zeros(tuned).items():
        np.testing.assert_array_equal(gone, zeros(pruned)[name])
        assert np.abs(stacked(tuned)[name] - stacked(pruned)[name]).max() > 1e-3


def test_a_step_that_is_not_finite_changes_no_mask(tmp_path):
    """The third step would change them; the same update comes one step later."""
    for steps in (2, 3):
        with pytest.raises(tiny.Crash):
            trained(
                tmp_path / str(steps),
                batches=tiny.Walks(spoil=(3,), crash_at=steps + 1),
                objective=tiny.nan_at_spoiled,
                checkpoint_every=1,
            )
    before, after = (efftrain.load(tmp_path / str(steps)) for steps in (2, 3))
    tiny.assert_same_parameters(after, before)
    whole = trained(tmp_path / "3", batches=tiny.Walks(spoil=(3,)), objective=tiny.nan_at_spoiled, checkpoint_every=1)
    assert all(gone.mean() == 0.5 for gone in zeros(whole).values())
    assert all(np.isfinite(w).all() for w in stacked(whole).values())


def test_a_sparse_run_resumes_from_a_dense_one(tmp_path):
    tiny.train(tmp_path / "dense", keep_every=3)
    for score in (Magnitude(), Magnitude(straight_through=True)):
        sparsity = Sparsity(schedule=OneShot(at=0.5), score=score)
        out = tmp_path / f"sparse{score.straight_through}"
        model = trained(out, sparsity, resume_from=f"{tmp_path / 'dense'}@3")
        assert all(gone.mean() == 0.5 for gone in zeros(model).values())
        assert [row["step"] for row in tiny.read_metrics(out)] == [4, 5, 6, 7, 8]
        dense = {row["step"]: row["loss"] for row in tiny.read_metrics(tmp_path / "dense")}
        sparse = {row["step"]: row["loss"] for row in tiny.read_metrics(out)}
        for step in (4, 5):
            assert sparse[step] == pytest.approx(dense[step], abs=1e-5)  # the fifth update prunes
        assert abs(sparse[6] - dense[6]) > 1e-4


@pytest.mark.parametrize("schedule", [OneShot(at=0.1), Gradual(start=0.1, end=0.3), Iterative(start=0.1, rewind=True)])
def test_resuming_after_a_step_of_the_schedule_prunes_at_once(tmp_path, schedule):
    tiny.train(tmp_path / "dense", keep_every=3)
    model = trained(tmp_path / "sparse", Sparsity(schedule=schedule), resume_from=f"{tmp_path / 'dense'}@6")
    for name, gone in zeros(model).items():
        assert gone.mean() == 0.5, name


def test_a_run_of_another_score_resumes_from_a_sparse_one(tmp_path):
    trained(tmp_path / "sparse", keep_every=3)
    score = Magnitude(straight_through=True)
    model = trained(tmp_path / "other", replace(PRUNED, score=score), resume_from=f"{tmp_path / 'sparse'}@6")
    for name, gone in zeros(model).items():
        assert gone.mean() == 0.5, name
    assert tiny.read_metrics(tmp_path / "other")[0]["loss"] == pytest.approx(
        tiny.read_metrics(tmp_path / "sparse")[6]["loss"], abs=1e-5
    )


def test_what_does_not_fit_is_refused(tmp_path):
    for make, words in (
        (lambda: Unstructured(sparsity=1.0), "below 1"),
        (lambda: Unstructured(sparsity=-0.1), "from 0"),
        (lambda: SemiStructured(n=5, m=4), "0 < n <= m"),
        (lambda: Gradual(start=0.5, end=0.5), "start < end"),
        (lambda: Sparsity(structure=SemiStructured(), distribution=Global()), "n:m is the same"),
        (lambda: Sparsity(score=RigL()), "Constant"),
        (lambda: Sparsity(layers="("), "regular expression"),
        (lambda: Sparsity(schedule=Iterative(sparsity=0.8)), "both the same value"),
        (lambda: Sparsity(schedule=Gradual(end=0.9)).around(tiny.TRAINING), "decays from 0.8"),
        (lambda: Sparsity(schedule=OneShot(at=1.0)).around(replace(tiny.TRAINING, schedule=Cosine())), "the last one"),
        (lambda: run(Sparsity(layers="blocks/9/.*"), steps=1), "matches no matrix; they are blocks/0/attention/key"),
        (lambda: run(Sparsity(structure=SemiStructured(n=2, m=5)), steps=1), "groups of 5 do not divide its 16 inputs"),
        (lambda: run(Sparsity(structure=Blocks(columns=5)), steps=1), "do not divide its 16 x"),
    ):
        with pytest.raises(ConfigError) as error:
            make()
        assert words in str(error.value)
    Sparsity(schedule=Gradual(end=0.9)).around(replace(tiny.TRAINING, schedule=Cosine()))
    trained(tmp_path)
    with pytest.raises(RunError, match="another model or optimizer"):
        tiny.train(tmp_path, steps=8, batches=tiny.Walks())  # without the masks
