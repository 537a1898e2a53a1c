"""Attention over rows whose tokens are split over devices: the same numbers, and only keys and values move."""

import functools
import re

import jax
import numpy as np
import pytest

from efftrain.errors import ConfigError
from efftrain.ops.attention import causal_attention
from efftrain.ops.attention_backends import attention
from efftrain.sharding.context import attend_on_mesh
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import DEFAULT_RULES, activation_spec, use

BATCH, LENGTH, HEADS, KV_HEADS, D_HEAD = 4, 48, 8, 2, 6
HEAD_AXES = [("heads",), ("kv_heads",), ("kv_heads",), ("heads",)]
WHOLE_KV = DEFAULT_RULES.replace(kv_heads=None)
MESHES = {
    "context8": (MeshConfig(fsdp=1, context=8), DEFAULT_RULES),
    "fsdp2-context4": (MeshConfig(fsdp=2, context=4), DEFAULT_RULES),
    "tensor2-context4": (MeshConfig(fsdp=1, tensor=2, context=4), DEFAULT_RULES),
    "tensor4-context2": (MeshConfig(fsdp=1, tensor=4, context=2), WHOLE_KV),  # more shards than key heads
}


def draw(length=LENGTH):
    """Random q, k, v, a direction for gradients, and documents that cross the borders between devices."""
    rng = np.random.default_rng(0)
    shapes = [(BATCH, length, n, D_HEAD) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    segments = (np.arange(length) >= rng.integers(1, length, (BATCH, 3, 1))).sum(1)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes], segments.astype(np.int32)


def value_and_gradients(attend, **options):
    def weighted(q, k, v, direction, segments):
        out = attend(q, k, v, segments)
        return (out * direction).sum(), out

    return jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True), **options)


@functools.cache
def alone(window, packed, length=LENGTH):
    arrays, segments = draw(length)

    def attend(q, k, v, segments):
        return causal_attention(q, k, v, segments_bs=segments, window=window, n_blocks=1)

    return value_and_gradients(attend)(*arrays, segments if packed else None)


def compile_spread(window, packed, *, length=LENGTH, backend="xla"):
    """The compiled program on the current mesh, and its arguments, split as the layers of a model have them."""
    arrays, segments = draw(length)
    segments = segments if packed else None

    def attend(q, k, v, segments):
        kernel = functools.partial(attention, window=window, backend=backend, n_blocks=2)
        return attend_on_mesh(kernel, q, k, v, segments, window=window, per_device=backend != "xla")

    specs = [
        activation_spec(a.shape, "batch", "length", *names, None) for a, names in zip(arrays, HEAD_AXES, strict=True)
    ]
    q, k, *_ = specs
    rows = None if segments is None else activation_spec(segments.shape, "batch", "length")
    split = {"in_shardings": (*specs, rows), "out_shardings": ((None, q), (q, k, k))}
    return value_and_gradients(attend, **split).lower(*arrays, segments).compile(), (*arrays, segments)


def check(found, truth):
    (_, out), gradients = found
    (_, true_out), true_gradients = truth
    for name, a, b in zip("oqkv", (out, *gradients), (true_out, *true_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("window", [None, 1, 5, 14, 30])
def test_values_and_gradients_are_those_of_one_device(mesh, window):
    """Windows that end on the own part, on the one before it, and several parts back."""
    config, rules = MESHES[mesh]
    with use(make_mesh(config), rules):
        program, arguments = compile_spread(window, True)
        found = program(*arguments)
    check(found, alone(window, True))


@pytest.mark.parametrize("window", [None, 14])
def test_rows_of_one_segment(window):
    """Without segments, the keys that wrap round to the first devices must still be hidden."""
    with use(make_mesh(MeshConfig(fsdp=1, context=8))):
        program, arguments = compile_spread(window, False)
        found = program(*arguments)
    check(found, alone(window, False))


@pytest.mark.parametrize(("window", "packed"), [(None, True), (150, True), (None, False)])
def test_tpu_kernel_on_each_device(window, packed):
    """Interpreted: rows, heads and tokens split, and keys of twice the queries' length."""
    with use(make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))):
        program, arguments = compile_spread(window, packed, length=256, backend="splash")
        found = program(*arguments)
    check(found, alone(window, packed, 256))


def collectives(program):
    """(name, dimensions without those of size 1, sorted) of every collective; the sum of the test's loss left out."""
    names = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|collective-broadcast|ragged-all-to-all"
    found = re.findall(rf"= (\S.*?) ({names})(?:-start)?\(", program.as_text())
    shapes = [
        (name, kind, tuple(sorted(int(n) for n in dims.split(",") if n not in ("", "1"))))
        for result, name in found
        for kind, dims in re.findall(r"([a-z]\w+)\[([\d,]*)\]", result)
    ]
    return [(name, kind, dims) for name, kind, dims in shapes if dims]


def test_keys_and_values_move_and_nothing_else():
    with use(make_mesh(MeshConfig(fsdp=2, context=4))):
        program, _ = compile_spread(None, True)
    part = LENGTH // 4
    fetched = tuple(sorted((4, BATCH // 2, part, KV_HEADS, D_HEAD)))  # queries would have HEADS, scores LENGTH
    returned = tuple(sorted((BATCH // 2, part, KV_HEADS, D_HEAD)))
    ids = tuple(sorted((4, BATCH // 2, part)))
    assert sorted(collectives(program)) == sorted(
        [("all-gather", "f32", fetched)] * 2 + [("all-gather", "s32", ids)] + [("reduce-scatter", "f32", returned)] * 2
    )


@pytest.mark.parametrize(("window", "hops"), [(1, 0), (2, 1), (7, 1), (8, 2), (14, 3)])
def test_window_fetches_only_the_parts_that_it_reaches(window, hops):
    """6 tokens a device: a window of 7 reaches the part before from every token, one of 8 a token further."""
    with use(make_mesh(MeshConfig(fsdp=1, context=8))):
        program, _ = compile_spread(window, True)
    part = tuple(sorted((BATCH, LENGTH // 8, KV_HEADS, D_HEAD)))
    moved = [(name, dims) for name, kind, dims in collectives(program) if kind == "f32"]
    assert moved == [("collective-permute", part)] * (4 * hops)  # keys and values, there and their gradients back


def test_row_that_the_mesh_cannot_split():
    with use(make_mesh(MeshConfig(fsdp=1, context=8))), pytest.raises(ConfigError) as error:
        compile_spread(None, True, length=20)
    assert "dimension 1 (length) has size 20, which mesh axis context=8 cannot split 8 ways" in str(error.value)


def test_without_a_mesh_nothing_is_divided():
    arrays, segments = draw()
    out = attend_on_mesh(causal_attention, *arrays[:3], segments, window=None, per_device=True)
    np.testing.assert_array_equal(out, causal_attention(*arrays[:3], segments_bs=segments))
