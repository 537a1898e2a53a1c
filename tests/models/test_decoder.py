"""The whole decoder against NumPy in float64, and what must not change its results."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from numpy_llama import forward

from efftrain.errors import ConfigError
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.ops.cross_entropy import cross_entropy


@jax.jit
def logits(model, tokens, segments=None, positions=None):
    return model(tokens, segments_bt=segments, positions_bt=positions)


def loss_and_gradients(model):
    """The loss that training takes, on packed rows."""
    tokens, weights = tiny.tokens(), tiny.SEGMENTS > 0

    def loss(state):
        built = nnx.merge(graph, state)
        hidden, _ = built.hidden(tokens, segments_bt=tiny.SEGMENTS, positions_bt=tiny.POSITIONS)
        return cross_entropy(hidden, built.head_kernel(), tiny.tokens(seed=1), weights) / weights.sum()

    graph, state = nnx.split(model)
    return jax.jit(jax.value_and_grad(loss))(state)


def with_weights(model, **changes):
    """The same weights computed in another way."""
    other = nnx.eval_shape(lambda: Decoder(model.config.replace(**changes), rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(other)[0], nnx.state(model))


@pytest.fixture(scope="module")
def model():
    return tiny.build(tiny.config())


@pytest.fixture(scope="module")
def plain(model):
    """Loss and gradients of the unrolled model without remat."""
    return loss_and_gradients(model)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scan": True},
        {"tied_embedding": True, "n_repeats": 1, "norm_eps": 0.5},
        {"pattern": (tiny.LOCAL, tiny.PLAIN, tiny.PLAIN), "scan": True},
    ],
    ids=["unrolled", "scan", "tied", "pattern of three"],
)
def test_logits_are_those_of_the_formulas(changes):
    model = tiny.build(tiny.config(**changes))
    packed = tiny.tokens(), tiny.SEGMENTS, tiny.POSITIONS
    np.testing.assert_allclose(logits(model, *packed), forward(model, *packed), atol=2e-5)


def test_a_row_is_one_document_from_position_zero_unless_told(model):
    np.testing.assert_allclose(logits(model, tiny.tokens()), forward(model, tiny.tokens()), atol=2e-5)


def test_the_truth_sees_every_part(model):
    """What the comparison above is worth: each parameter moves the NumPy logits too."""
    tokens, rng = tiny.tokens(1, 5), np.random.default_rng(0)
    before = forward(model, tokens)
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    for i in range(len(leaves)):
        moved = jax.tree.unflatten(
            tree, [*leaves[:i], leaves[i] * rng.uniform(0.5, 1.5, leaves[i].shape), *leaves[i + 1 :]]
        )
        assert np.abs(forward(nnx.merge(graph, moved), tokens) - before).max() > 1e-3


def test_packed_documents_do_not_see_each_other(model):
    """Changing document 1 must not move any logit of document 2 in the same row."""
    tokens = tiny.tokens()
    changed = tokens.copy()
    changed[0, 1] = (changed[0, 1] + 1) % 29
    before, after = (logits(model, t, tiny.SEGMENTS, tiny.POSITIONS) for t in (tokens, changed))
    same_document = tiny.SEGMENTS[0] == 1
    chex.assert_trees_all_equal(before[0, ~same_document], after[0, ~same_document])
    chex.assert_trees_all_equal(before[1], after[1])
    assert jnp.abs(before - after)[0, 1:4].max(axis=-1).min() > 1e-3  # the change did reach document 1


def test_a_packed_document_reads_as_it_does_alone(model):
    alone = logits(model, tiny.tokens()[:1, 4:9])
    packed = logits(model, tiny.tokens(), tiny.SEGMENTS, tiny.POSITIONS)
    np.testing.assert_allclose(packed[:1, 4:9], alone, atol=1e-5)


@pytest.mark.smoke
def test_a_later_token_never_moves_an_earlier_logit(model):
    tokens = tiny.tokens()
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 29
    before, after = logits(model, tokens), logits(model, changed)
    chex.assert_trees_all_equal(before[:, :7], after[:, :7])
    assert jnp.abs(before - after)[:, 7].max() > 1e-3


@pytest.mark.parametrize(
    ("scan", "remat"),
    [(False, "dots"), (True, "none"), (True, "full")],
    ids=["unrolled-dots", "scan-none", "scan-full"],
)
def test_scan_and_remat_change_neither_loss_nor_gradients(model, plain, scan, remat):
    loss, gradients = loss_and_gradients(with_weights(model, scan=scan, remat=remat))
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    chex.assert_trees_all_close(gradients, plain[1], rtol=1e-4, atol=1e-6)


def test_remat_computes_the_forward_pass_again(model):
    """Else the test above would pass with a policy that does nothing: count the exponentials (one a softmax)."""

    def exponentials(remat):
        graph, state = nnx.split(with_weights(model, remat=remat))
        gradient = jax.grad(lambda state: nnx.merge(graph, state)(tiny.tokens()).sum())
        return str(jax.make_jaxpr(gradient)(state)).count("= exp ")

    none, full, dots = map(exponentials, ("none", "full", "dots"))
    assert none < full
    assert none < dots


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_learns(plain, tied):
    gradients = loss_and_gradients(tiny.build(tiny.config(tied_embedding=True)))[1] if tied else plain[1]
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        per_layer = gradient if "blocks" in jax.tree_util.keystr(path) else gradient[None]
        assert all(np.abs(layer).max() > 1e-5 for layer in per_layer), path


def test_gradients_are_those_of_finite_differences(model, plain):
    """Against the NumPy forward pass, along one random direction through all parameters."""
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda a: rng.normal(size=a.shape), state)
    weights, targets = tiny.SEGMENTS > 0, tiny.tokens(seed=1)

    def loss(amount):
        with jax.enable_x64(True):
            moved = jax.tree.map(lambda a, d: jnp.asarray(np.asarray(a, np.float64) + amount * d), state, direction)
            z = forward(nnx.merge(graph, moved), tiny.tokens(), tiny.SEGMENTS, tiny.POSITIONS)
        nll = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, targets[..., None], -1)[..., 0]
        return (nll * weights).sum() / weights.sum()

    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (np.asarray(g, np.float64) * d).sum(), plain[1], direction)))
    np.testing.assert_allclose(plain[0], loss(0), rtol=1e-6)
    np.testing.assert_allclose(slope, (loss(1e-6) - loss(-1e-6)) / 2e-6, rtol=1e-4)


def test_bfloat16_computes_with_float32_parameters():
    model = nnx.eval_shape(lambda: Decoder(tiny.config(dtype="bfloat16"), rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert jax.eval_shape(lambda m: m.hidden(tiny.tokens())[0], model).dtype == jnp.bfloat16
    assert jax.eval_shape(lambda m: m(tiny.tokens()), model).dtype == jnp.float32


def test_bfloat16_gradients_are_float32_and_close(model, plain):
    loss, gradients = loss_and_gradients(with_weights(model, dtype="bfloat16"))
    np.testing.assert_allclose(loss, plain[0], rtol=0.01)
    assert abs(loss - plain[0]) > 1e-5  # it did compute in bfloat16
    for (path, gradient), exact in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(plain[1]), strict=True
    ):
        assert gradient.dtype == jnp.float32
        assert jnp.linalg.norm(gradient - exact) < 0.05 * jnp.linalg.norm(exact), path


def test_a_frequent_token_keeps_its_whole_gradient_in_bfloat16():
    """4,096 ones added up in bfloat16 stop at 256: there 256 + 1 is 256."""
    from efftrain.models.linear import Embedding

    graph, state = nnx.split(Embedding(3, 2, rngs=nnx.Rngs(0), dtype="bfloat16"))
    tokens = jnp.ones((8, 512), jnp.int32)
    gradient = jax.grad(lambda state: nnx.merge(graph, state)(tokens).astype(jnp.float32).sum())(state)
    np.testing.assert_array_equal(gradient.table[...], [[0, 0], [4096, 4096], [0, 0]])


@pytest.mark.parametrize("tied", [False, True])
def test_the_number_of_parameters(tied):
    """Counted from the definition: table, per layer attention, SwiGLU and two norms, last norm, head unless tied."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(tiny.config(tied_embedding=tied), rngs=nnx.Rngs(0))))
    plain = 16 * (4 + 2 + 2) * 4 + 4 * 4 * 16 + 3 * 16 * 24 + 2 * 16
    local = 16 * (2 + 2 + 2) * 8 + 2 * 8 * 16 + 3 * 16 * 12 + 2 * 16 + 2 * 8
    assert sum(a.size for a in jax.tree.leaves(state)) == 29 * 16 * (2 - tied) + 2 * (plain + local) + 16


def test_every_parameter_names_an_axis_for_each_dimension():
    model = nnx.eval_shape(lambda: Decoder(tiny.config(), rngs=nnx.Rngs(0)))
    variables = jax.tree_util.tree_leaves_with_path(nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable))
    assert len(variables) == 2 + 1 + 9 + 11
    for path, variable in variables:
        axes, units = (variable.get_metadata()[name] for name in ("axes", "units"))
        assert len(axes) == len(units) == len(variable.shape), path
        assert all(size % unit == 0 for size, unit in zip(variable.shape, units, strict=True)), path
        assert (axes[0] == "layers") == ("blocks" in jax.tree_util.keystr(path)), path
        assert "layers" not in axes[1:], path
    query = model.blocks[0].attention.query.kernel.get_metadata()
    assert query["axes"] == ("layers", "embed", "heads")
    assert query["units"] == (2, 16, 4)


def test_initial_weights_are_drawn_apart_and_in_scale():
    """LeCun: variance 1/d_in, smaller by 2 x layers where a block writes to the residual stream."""
    config = llama(vocab_size=64, d_model=64, n_layers=3, n_heads=4, d_ff=64, max_length=8)
    build = jax.jit(lambda key: nnx.state(Decoder(config, rngs=nnx.Rngs(params=key))))
    state = build(jax.random.key(0))
    attention, mlp = state.blocks[0].attention, state.blocks[0].mlp
    into = [attention.query, attention.key, attention.value, mlp.gate, mlp.up]
    out_of = [attention.out, mlp.down]
    for linear in into:
        np.testing.assert_allclose(np.var(linear.kernel[...]), 1 / 64, rtol=0.05)
    for linear in out_of:
        np.testing.assert_allclose(np.var(linear.kernel[...]), 1 / 64 / 6, rtol=0.05)
    np.testing.assert_allclose(np.var(state.embedding.table[...]), 0.02**2, rtol=0.1)
    layers = [np.asarray(linear.kernel[i]).ravel() for linear in into + out_of for i in range(3)]
    assert np.abs(np.corrcoef(layers) - np.eye(21)).max() < 0.1
    chex.assert_trees_all_equal(state, build(jax.random.key(0)))
    assert not np.array_equal(build(jax.random.key(1)).head.kernel[...], state.head.kernel[...])


def test_a_row_longer_than_the_model_is_refused(model):
    with pytest.raises(ConfigError, match=r"a row has 25 tokens and model.max_length is 24"):
        model(tiny.tokens(1, 25))
    assert jax.eval_shape(model, tiny.tokens(1, 24)).shape == (1, 24, 29)
