"""The Pallas kernel, interpreted on CPU, against attention with all scores in float64; and its program for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from efftrain.ops.attention_backends import attention
from efftrain.ops.attention_splash import splash_attention

BATCH, HEADS, KV_HEADS, D_HEAD = 2, 4, 2, 16


def draw(t, s, *, packed, dtype="float32"):
    rng = np.random.default_rng(t + s)
    shapes = [(BATCH, t, HEADS, D_HEAD), *[(BATCH, s, KV_HEADS, D_HEAD)] * 2, (BATCH, t, HEADS, D_HEAD)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    segments = (np.arange(s) >= rng.integers(1, s, (BATCH, 4, 1))).sum(1).astype(np.int32)
    return arrays, segments if packed else None


def value_and_gradients(q, k, v, direction, segments, window):
    """Output, and the gradients of sum(direction * output), by the formulas of the softmax in float64."""
    q, k, v, direction = (np.asarray(a, np.float64) for a in (q, k, v, direction))
    group, t, s = HEADS // KV_HEADS, q.shape[1], k.shape[1]
    k, v = (a.repeat(group, axis=2) for a in (k, v))
    distance = np.arange(s - t, s)[:, None] - np.arange(s)
    mask = np.broadcast_to((distance >= 0) & (distance < (window or s)), (BATCH, t, s))
    if segments is not None:
        mask = mask & (segments[:, s - t :, None] == segments[:, None])
    scores = np.where(mask[:, None], np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(D_HEAD), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dv = np.einsum("bhts,bthd->bshd", weights, direction)
    dweights = np.einsum("bthd,bshd->bhts", direction, v)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) / np.sqrt(D_HEAD)
    dq, dk = np.einsum("bhts,bshd->bthd", dscores, k), np.einsum("bhts,bthd->bshd", dscores, q)
    dk, dv = (a.reshape(BATCH, s, KV_HEADS, group, D_HEAD).sum(3) for a in (dk, dv))
    return [np.einsum("bhts,bshd->bthd", weights, v), dq, dk, dv]


def by_kernel(q, k, v, direction, segments, window):
    def weighted(q, k, v):
        out = splash_attention(q, k, v, segments_bs=segments, window=window, interpret=True)
        return (out * direction).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
    return [out, *gradients]


@pytest.mark.parametrize(
    ("t", "s", "packed", "window"),
    [
        (256, 256, True, None),
        (256, 256, True, 40),
        (100, 100, False, None),  # padded at the end
        (256, 256, False, 128),  # a window of a whole block
        (64, 192, True, None),  # the last part of a row
        (60, 130, False, 70),  # padded at both sides, and in front in a segment of its own
        (128, 384, True, 130),
    ],
)
def test_kernel_gives_values_and_gradients_of_the_formula(t, s, packed, window):
    arrays, segments = draw(t, s, packed=packed)
    truth = value_and_gradients(*arrays, segments, window)
    for name, found, true in zip("oqkv", by_kernel(*arrays, segments, window), truth, strict=True):
        np.testing.assert_allclose(found, true, atol=5e-6, err_msg=name)


def test_bfloat16_stays_bfloat16_and_near_the_truth():
    arrays, segments = draw(128, 128, packed=True, dtype="bfloat16")
    truth = value_and_gradients(*arrays, segments, None)
    for found, true in zip(by_kernel(*arrays, segments, None), truth, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float32), true, atol=0.03 * np.abs(true).max())


def loss(q, k, v, segments):
    return attention(q, k, v, segments_bs=segments, window=200, backend="auto").astype(jnp.float32).sum()


def abstract(length, d_head, **options):
    shapes = [((2, length, n, d_head), jnp.bfloat16) for n in (4, 2, 2)] + [((2, length), jnp.int32)]
    return [jax.ShapeDtypeStruct(shape, dtype, **options) for shape, dtype in shapes]


@pytest.mark.parametrize("d_head", [16, 64, 128])
def test_program_for_tpus_has_the_kernel_and_no_matrix_of_scores(d_head):
    """Lowered without a TPU; that it also compiles is the next test."""
    tpu = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("fsdp",), (AxisType.Auto,), abstract_device=tpu)
    length = 640  # of five blocks: no other dimension has this size
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*abstract(length, d_head))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 3  # forward, gradient of q, gradient of k and v
    assert f"{length}x{length}x" not in text


@pytest.mark.tpu_aot
@pytest.mark.parametrize("d_head", [16, 64, 128])
def test_kernels_compile_for_a_tpu(d_head):
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices[:1])
    arguments = abstract(640, d_head, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * 640 * 640 * 4  # less than one matrix of scores


def test_rows_of_any_length_cost_only_their_padding():
    """The kernel is built for 128-multiples: 130 tokens are 256, not 384."""
    shape = (1, 130, HEADS, D_HEAD)
    jaxpr = jax.make_jaxpr(functools.partial(splash_attention, interpret=True))(*(jnp.zeros(shape),) * 3)
    assert "float32[1,4,256,16]" in str(jaxpr).replace("f32", "float32")
    assert "384" not in str(jaxpr)
