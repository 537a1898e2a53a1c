"""A mesh changes where the numbers are, not what they are: random meshes and models against one device."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.sharding.layout import state_shardings
from efftrain.sharding.mesh import AXES, MeshConfig, make_mesh
from efftrain.sharding.rules import DEFAULT_RULES, use
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.step import accumulate

ROWS, LENGTH, VOCAB = 16, 32, 64
WIDE = Attention(n_heads=8, n_kv_heads=8, d_head=4)
GROUPED = Attention(n_heads=8, n_kv_heads=2, d_head=4, qk_norm=True)
LOCAL = Attention(n_heads=8, n_kv_heads=4, d_head=4, window=5, n_blocks=3)
LONG = Attention(n_heads=8, n_kv_heads=2, d_head=4, window=20, n_blocks=2)
PATTERNS = {"wide": (WIDE,), "grouped": (GROUPED,), "local and global": (LOCAL, GROUPED), "long window": (LONG,)}


@dataclasses.dataclass(frozen=True)
class Case:
    pattern: str
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009, a frozen value
    scan: bool = False
    remat: str = "none"
    n_microbatches: int = 1


def draw_mesh(rng) -> MeshConfig:
    """8 devices: each factor 2 goes to some axis; slices where replica spans them."""
    sizes = dict.fromkeys(AXES, 1)
    for axis in rng.choice(AXES, 3):
        sizes[axis] *= 2
    return MeshConfig(**sizes, slices=int(rng.integers(1, 3)) if sizes["replica"] > 1 else 1)


def draw_cases(seed: int, n: int) -> list[Case]:
    """``n`` different ones, the patterns in turn."""
    rng, cases = np.random.default_rng(seed), {}
    while len(cases) < n:
        case = Case(
            pattern=list(PATTERNS)[len(cases) % len(PATTERNS)],
            mesh=draw_mesh(rng),
            scan=bool(rng.integers(2)),
            remat=str(rng.choice(["none", "full", "dots"])),
            n_microbatches=int(rng.integers(1, 3)),
        )
        cases[case.mesh, case.pattern] = case
    return list(cases.values())


CASES = draw_cases(seed=4, n=12)


def name(case: Case) -> str:
    mesh = "-".join(f"{axis}{n}" for axis, n in case.mesh.sizes().items() if n > 1)
    return f"{case.pattern}-{mesh}-{'scan' if case.scan else 'unrolled'}-{case.remat}-{case.n_microbatches}"


def draw(shapes: nnx.State) -> nnx.State:
    """NumPy's numbers: compiling the real initialisation for every mesh takes longer than the step."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if "scale" in jax.tree_util.keystr(path):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (rng.normal(size=leaf.shape) * leaf.shape[-2] ** -0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def batch():
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH + 1), 0, VOCAB)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": jnp.cumsum(tokens[:, :-1] < 4, axis=1) + 1,
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH)),
        "mask": tokens[:, 1:] != 7,
    }


@functools.cache  # one device is asked for again
def loss_and_gradients(case: Case, n_devices: int):
    blocks = tuple(BlockConfig(attention=attention, mlp=Dense(d_ff=48)) for attention in PATTERNS[case.pattern])
    model = ModelConfig(
        vocab_size=VOCAB, d_model=32, pattern=blocks, n_repeats=2, max_length=LENGTH, scan=case.scan, remat=case.remat
    )
    mesh = make_mesh(case.mesh, jax.devices()[:n_devices])
    shared = any(block.attention.n_kv_heads % mesh.shape["tensor"] for block in blocks)
    rules = DEFAULT_RULES.replace(kv_heads=None) if shared else DEFAULT_RULES
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    shardings = state_shardings(abstract, mesh, rules)

    def mean_loss_and_gradients(params, batch):
        def gradient_of(batch, key):
            return jax.value_and_grad(lambda p: next_token_loss(nnx.merge(graph, p), batch, key)[:2], has_aux=True)(
                params
            )

        (total, count), gradients = accumulate(gradient_of, batch, jax.random.key(2), case.n_microbatches)
        return total / count, jax.tree.map(lambda g: g / count, gradients)

    with use(mesh, rules):
        step = jax.jit(mean_loss_and_gradients, out_shardings=(None, shardings))
        return jax.device_get(step(jax.device_put(draw(abstract), shardings), batch()))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_loss_and_gradients_equal_those_of_one_device(case):
    loss, gradients = loss_and_gradients(case, 8)
    loss_of_one, gradients_of_one = loss_and_gradients(Case(case.pattern), 1)
    assert abs(loss - loss_of_one) < 1e-5
    chex.assert_trees_all_close(gradients, gradients_of_one, atol=1e-5)
    assert all(abs(g).max() > 1e-4 for g in jax.tree.leaves(gradients))


def test_the_drawn_cases_are_not_all_alike():
    """Each axis is split somewhere, context together with others, and every choice of the model occurs with it."""
    assert {axis for case in CASES for axis, n in case.mesh.sizes().items() if n > 1} == set(AXES)
    split = [case for case in CASES if case.mesh.context > 1]
    assert {case.pattern for case in split} == set(PATTERNS)
    assert {case.scan for case in split} == {True, False}
    assert {case.remat for case in split} == {"none", "full", "dots"}
    assert {case.n_microbatches for case in split} == {1, 2}
    assert max(case.mesh.context for case in CASES) > 2
    assert any(case.mesh.tensor > 2 and case.pattern == "grouped" for case in CASES)
    assert any(case.mesh.slices > 1 for case in CASES)
