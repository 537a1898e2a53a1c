"""The loss of early exits against one that is put together from single exits, and layer dropout against its rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from efftrain.errors import ConfigError
from efftrain.models.config import LayerDropout
from efftrain.models.stack import dropout_rates, dropout_strength, mean_kept
from efftrain.ops.cross_entropy import token_nll
from efftrain.train.objectives.objective import EarlyExitLoss, exit_weights, next_token_loss

LENGTH = 12
BATCH = tiny.rows(tiny.tokens(2, LENGTH + 1))


@pytest.fixture(scope="module")
def model():
    return tiny.build(tiny.config())


def exit_losses(model, batch=BATCH) -> np.ndarray:
    """(layers, batch, length) nats behind every layer, with logits in full."""
    x_btd, positions, found = model.embedding(batch["tokens"]), batch["positions"], []
    for layer in model.layers():
        x_btd, _ = layer(x_btd, positions, batch["segments"])
        found.append(token_nll(model.exit_logits(x_btd), batch["targets"]))
    return np.stack(found)


def test_weights_are_those_of_the_paper_counted_from_one():
    scale, n = 0.2, 5
    weights = [scale * sum(range(1, i + 1)) for i in range(1, n)] + [n + scale * sum(range(1, n))]
    np.testing.assert_allclose(exit_weights(n, scale), weights, rtol=1e-6)


def test_equal_weights_are_those_of_every_exit(model):
    losses = exit_losses(model).sum((1, 2))
    possible = [(losses[3] + 0.5 * exit_) / 1.5 for exit_ in losses[:3]]
    for seed in range(8):
        total = float(EarlyExitLoss(scale=0.5, weighting="equal")(model, BATCH, jax.random.key(seed))[0])
        assert min(abs(total - p) for p in possible) < 1e-5 * total


@pytest.mark.parametrize("every", [None, 2, 1])
def test_the_loss_is_the_weighted_mean_of_the_exits_of_a_step(model, every):
    objective, losses = EarlyExitLoss(scale=0.5, every=every), exit_losses(model).sum((1, 2))
    weights = np.asarray(exit_weights(4, 0.5))
    found = {}
    for seed in range(30):
        total, count, metrics = objective(model, BATCH, jax.random.key(seed))
        found[round(float(total), 2)] = (float(total), float(metrics["loss/exits"][0]))
        assert float(metrics["loss"][0]) == pytest.approx(losses[-1], rel=1e-5)
        assert float(count) == 2 * LENGTH
    every = every or 3
    expected = []
    for first in range(every):
        exits = list(range(first, 3, every))
        w, all_exits = weights[[*exits, 3]], [*exits, 3]
        expected.append(((w * losses[all_exits]).sum() / w.sum(), losses[exits].sum()))
    # Every choice of a first exit comes up, and nothing else.
    np.testing.assert_allclose(sorted(found.values()), sorted(expected), rtol=1e-5)


def test_a_stride_takes_every_token_once_and_keeps_the_scale(model):
    """Over all offsets, the mean of the strided exit loss is that of all tokens."""
    losses = exit_losses(model)
    weights = np.asarray(exit_weights(4, 1.0))
    mask = np.ones((2, LENGTH), bool)
    mask[0, :5] = False
    batch = BATCH | {"mask": mask}
    seen = set()
    for seed in range(60):
        total, _, metrics = EarlyExitLoss(scale=1.0, stride=3)(model, batch, jax.random.key(seed))
        for exit_ in range(3):
            for offset in range(3):
                part, part_mask = losses[exit_][:, offset::3], mask[:, offset::3]
                exits = (part * part_mask).sum() * mask.sum() / part_mask.sum()
                last = (losses[3] * mask).sum()
                if np.isclose(
                    total, (weights[exit_] * exits + weights[3] * last) / (weights[exit_] + weights[3]), rtol=1e-5
                ):
                    seen.add((exit_, offset))
                    assert float(metrics["loss/exits"][1]) == pytest.approx(part_mask.sum())
    assert len(seen) == 9
    assert EarlyExitLoss(stride=3, after=4).heads(4, 10) == pytest.approx(1 / 3 * 0.6)
    with pytest.raises(ConfigError, match=r"exits\.stride is 5, which does not divide the 12 tokens"):
        EarlyExitLoss(stride=5)(model, BATCH, jax.random.key(0))


def test_without_a_key_it_is_the_plain_loss(model):
    a, b = EarlyExitLoss()(model, BATCH, None), next_token_loss(model, BATCH, None)
    np.testing.assert_array_equal(a[0], b[0])


def test_the_rotating_order_follows_the_steps():
    model = tiny.build(tiny.config(layer_dropout=LayerDropout(rate=0.01)))
    objective, found = EarlyExitLoss(scale=1.0, order="rotating"), []
    losses = exit_losses(model).sum((1, 2))
    for step in range(6):
        model.steps[...] = jnp.int32(step)
        found.append(float(objective(model, BATCH, jax.random.key(3))[2]["loss/exits"][0]))
    np.testing.assert_allclose(found[:3], found[3:], rtol=1e-6)
    np.testing.assert_allclose(found[:3], losses[:3], rtol=1e-4)
    with pytest.raises(ConfigError, match="'rotating' needs the count of steps"):
        objective(tiny.build(tiny.config()), BATCH, jax.random.key(0))


def test_exits_begin_after_so_many_steps():
    model = tiny.build(tiny.config(layer_dropout=LayerDropout(rate=1e-6)))
    objective, plain = EarlyExitLoss(after=2), EarlyExitLoss()
    for step in range(4):
        model.steps[...] = jnp.int32(step)
        total, _, metrics = objective(model, BATCH, jax.random.key(1))
        same, _, with_exit = plain(model, BATCH, jax.random.key(1))
        if step < 2:
            np.testing.assert_allclose(total, metrics["loss"][0], rtol=1e-6)
            assert [float(v) for v in metrics["loss/exits"]] == [0, 0]
        else:
            np.testing.assert_allclose(total, same, rtol=1e-6)
            np.testing.assert_allclose(metrics["loss/exits"], with_exit["loss/exits"], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"exits\.after needs the count of steps"):
        objective(tiny.build(tiny.config()), BATCH, jax.random.key(0))


def test_rates_grow_with_depth_and_time():
    rates = 0.2 * (2 ** np.array([0, 0.25, 0.5, 0.75, 1]) - 1)
    np.testing.assert_allclose(dropout_rates(5, 0.2, 1.0), rates, rtol=1e-6)
    assert [float(dropout_strength(step, 3, 10)) for step in (0, 3, 13, 50)] == [0, 0, 1, 1]
    assert 0.35 < float(dropout_strength(8, 3, 10)) < 0.45
    assert [float(dropout_strength(step, 4, 0)) for step in (0, 3, 4)] == [0, 0, 1]
    half = LayerDropout(rate=0.2, after=5)
    assert mean_kept(5, half, 10) == pytest.approx(1 - rates.mean() / 2)
    assert mean_kept(5, LayerDropout(rate=0.2, per_row=True), 10) == 1


@pytest.mark.parametrize("scan", [False, True])
def test_a_layer_that_is_left_out_is_as_if_it_were_not_there(scan):
    """Of four layers the last is left out in most steps; loss and gradient are those of the layers that are left."""
    model = tiny.build(tiny.config(layer_dropout=LayerDropout(rate=0.9), scan=scan))
    graph, state = nnx.split(model)
    layers = model.layers()
    losses = {}
    run = jax.jit(lambda key: next_token_loss(nnx.merge(graph, state), BATCH, key)[0::2])
    for seed in range(40):
        total, metrics = run(jax.random.key(seed))
        losses.setdefault(int(metrics["depth/kept"][0]), set()).add(round(float(total), 2))
    assert float(metrics["depth/kept"][1]) == 4
    for kept in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3]):
        x = model.embedding(BATCH["tokens"])
        for i in kept:
            x, _ = layers[i](x, BATCH["positions"], BATCH["segments"])
        expected = float(token_nll(model.exit_logits(x), BATCH["targets"]).sum())
        assert any(abs(expected - loss) < 0.02 for loss in losses[len(kept)])


def test_left_out_layers_have_no_gradient_and_the_steps_are_counted():
    model = tiny.build(tiny.config(layer_dropout=LayerDropout(rate=0.999)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, key):
        total, _, metrics = next_token_loss(nnx.merge(graph, params, rest), BATCH, key)
        return total, metrics

    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(params, jax.random.key(1))
    last = gradient.blocks[1].attention.query.kernel[...][1]
    assert float(metrics["depth/kept"][0]) < 4
    assert not np.asarray(last).any()
    assert np.asarray(gradient.blocks[0].attention.query.kernel[...][0]).any()
    model.after_step(metrics["statistics"])
    assert int(model.steps[...]) == 1


def test_a_coin_for_each_row_leaves_out_layers_of_single_rows():
    model = tiny.build(tiny.config(layer_dropout=LayerDropout(rate=0.9, per_row=True)))
    key = jax.random.key(0)
    hidden, metrics = model.hidden(BATCH["tokens"], key=key)
    assert float(metrics["depth/kept"][1]) == 4 * 2
    kept = np.asarray(jax.random.uniform(key, (4, 2)) >= dropout_rates(4, 0.9, 1.0)[:, None])
    for row in range(2):
        x = model.embedding(BATCH["tokens"][row : row + 1])
        for i, layer in enumerate(model.layers()):
            if kept[i, row]:
                x, _ = layer(x, BATCH["positions"][:1])
        np.testing.assert_allclose(hidden[row], model.norm(x)[0], atol=2e-5)


def test_what_cannot_be_is_refused():
    for make, message in (
        (lambda: LayerDropout(rate=1.0), r"layer_dropout\.rate is 1.0"),
        (lambda: LayerDropout(ramp_steps=-1), r"layer_dropout\.ramp_steps is -1"),
        (lambda: EarlyExitLoss(scale=0.0), r"exits\.scale is 0.0"),
        (lambda: EarlyExitLoss(weighting="none"), r"exits\.weighting is 'none'"),
        (lambda: EarlyExitLoss(every=0), r"exits\.every is 0"),
        (lambda: EarlyExitLoss(stride=0), r"exits\.stride is 0"),
        (lambda: EarlyExitLoss(order="up"), r"exits\.order is 'up'"),
        (lambda: EarlyExitLoss().heads(1, 10), "the model has one layer and no earlier exit"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
