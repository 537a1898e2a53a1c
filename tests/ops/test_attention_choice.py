"""Which kernel runs where, that each is compared with the reference before use, and what each refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from efftrain.errors import ConfigError
from efftrain.ops import attention_backends
from efftrain.ops.attention import causal_attention
from efftrain.ops.attention_backends import attention, choose_backend, difference
from efftrain.ops.attention_cudnn import cudnn_attention, explicit_mask
from efftrain.ops.attention_splash import splash_attention
from efftrain.ops.platform import platform


@pytest.fixture
def fresh():
    """Forgets what was checked, before and after."""
    attention_backends._failure.cache_clear()
    yield
    attention_backends._failure.cache_clear()


def mesh_of(name):
    device = AbstractDevice(device_kind=f"a {name}", num_cores=1, platform=name)
    mesh = AbstractMesh((2,), ("fsdp",), (AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("name", "dtype", "d_head", "length", "chosen"),
    [
        ("cpu", "bfloat16", 64, 256, "xla"),
        ("tpu", "bfloat16", 64, 256, "splash"),
        ("tpu", "float32", 20, 77, "splash"),
        ("gpu", "bfloat16", 64, 256, "cudnn"),
    ],
)
def test_auto_follows_the_devices_of_the_mesh(name, dtype, d_head, length, chosen):
    """And not those that JAX has: a topology that is compiled for is not attached."""
    with mesh_of(name):
        assert platform() == name
        assert choose_backend("auto", dtype, d_head, length) == chosen
    assert platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert platform() == "cpu"


@pytest.mark.parametrize(
    ("dtype", "d_head", "length", "capability", "why"),
    [
        ("float32", 64, 256, None, "takes bfloat16 or float16"),
        ("bfloat16", 20, 256, None, "attention.d_head is 20"),
        ("bfloat16", 512, 256, "9.0", "at most 256 .* compute capability 9.0 and attention.d_head is 512"),
        ("bfloat16", 64, 77, None, "rows of even length"),  # a mask
        ("bfloat16", 192, 256, "8.0", "at most 128 .* compute capability 8.0 and attention.d_head is 192"),
        ("bfloat16", 64, 256, "7.5", "needs a GPU of compute capability 8.0 and this one has 7.5"),
    ],
)
def test_auto_says_why_it_leaves_cudnn(monkeypatch, dtype, d_head, length, capability, why):
    monkeypatch.setattr(attention_backends, "attached_capability", lambda: capability)
    with mesh_of("gpu"), pytest.warns(UserWarning, match=f"'auto' takes 'xla', because cuDNN .*{why}"):
        assert choose_backend("auto", dtype, d_head, length) == "xla"


@pytest.mark.parametrize(
    ("capability", "largest"), [("8.0", 128), ("8.9", 128), ("9.0", 256), ("10.0", 256), ("12.0", 256), (None, 256)]
)
def test_the_largest_head_of_cudnn_follows_the_compute_capability(monkeypatch, capability, largest):
    """An explicit backend hears the reason before anything is compiled."""
    monkeypatch.setattr(attention_backends, "attached_capability", lambda: capability)
    with mesh_of("gpu"):
        assert choose_backend("auto", "bfloat16", largest, 256) == "cudnn"
        assert choose_backend("cudnn", "bfloat16", largest, 256) == "cudnn"
        with pytest.raises(ConfigError, match=f"'cudnn' takes heads of at most {largest} .* is {largest + 8}; change"):
            choose_backend("cudnn", "bfloat16", largest + 8, 256)


def test_the_check_takes_the_head_and_the_length_that_run(fresh, monkeypatch):
    checked = []
    monkeypatch.setattr(attention_backends, "difference", lambda backend, device, **shape: checked.append(shape))
    for d_head, length in ((192, 200), (192, 256), (64, 200), (64, 100), (64, 100_000)):
        assert choose_backend("splash", "bfloat16", d_head, length) == "splash"
    interpreted = [(192, 256), (64, 256), (64, 128)]  # no longer rows on CPU
    assert [(s["d_head"], s["length"]) for s in checked] == interpreted


@pytest.mark.parametrize(
    ("backend", "name", "sentence"),
    [
        ("cudnn", "cpu", "attention.backend is 'cudnn', which needs a GPU, and the devices are cpu; use 'auto'"),
        ("splash", "gpu", "attention.backend is 'splash', which needs a TPU, and the devices are gpu; use 'auto'"),
        ("flash", "cpu", "attention.backend is 'flash'; use one of 'auto', 'xla', 'splash', 'cudnn'"),
    ],
)
def test_kernel_of_another_platform_is_refused(backend, name, sentence):
    with mesh_of(name), pytest.raises(ConfigError) as error:
        choose_backend(backend, "bfloat16", 64, 256)
    assert str(error.value) == sentence


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_kernels_pass_the_check(backend):
    assert difference(backend, jax.devices()[0]) is None
    assert difference(backend, jax.devices()[0], d_head=24, length=128) is None


def no_gradient(q, k, v, *, segments_bs=None, window=None, **_):
    return causal_attention(q, jax.lax.stop_gradient(k), v, segments_bs=segments_bs, window=window)


def ignores_segments(q, k, v, *, segments_bs=None, window=None, **_):
    return causal_attention(q, k, v, window=window)


def ignores_window(q, k, v, *, segments_bs=None, window=None, **_):
    return causal_attention(q, k, v, segments_bs=segments_bs)


def groups_otherwise(q, k, v, *, segments_bs=None, window=None, **_):
    heads = jnp.arange(q.shape[2]) % k.shape[2]
    return causal_attention(q, k[:, :, heads], v[:, :, heads], segments_bs=segments_bs, window=window)


def does_not_compile(q, k, v, **_):
    raise NotImplementedError("no such instruction\nand a page of it")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (ignores_segments, "differs from the reference in the output for segments and a window on cpu"),
        (ignores_window, "differs from the reference in the output for segments and a window on cpu"),
        (groups_otherwise, "differs from the reference in the output for segments and a window on cpu"),
        (no_gradient, "differs from the reference in the gradient of k for"),
        (does_not_compile, "does not run on cpu with heads of 64 in rows of 256: no such instruction; use"),
    ],
)
def test_kernel_that_is_wrong_is_found_out(fresh, monkeypatch, broken, words):
    monkeypatch.setattr(attention_backends, "splash_attention", broken)
    with pytest.raises(ConfigError) as error:
        choose_backend("splash", "bfloat16", 64, 256)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_auto_leaves_a_wrong_kernel_with_a_warning_once_and_processes_must_agree(fresh, monkeypatch):
    monkeypatch.setattr(attention_backends, "splash_attention", ignores_segments)
    monkeypatch.setitem(attention_backends.PLATFORM, "splash", "cpu")
    with pytest.warns(UserWarning, match="differs from the reference in the output .* takes 'xla', which is slower"):
        assert choose_backend("auto", "bfloat16", 64, 256) == "xla"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="so that all processes agree"):
        choose_backend("auto", "bfloat16", 64, 256)


def test_check_runs_where_the_first_use_is_traced(fresh):
    """Inside jit, grad and a scan, the check must neither join the trace nor see its mesh."""
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 128, 2, 8)), jnp.float32)

    def loss(q, backend):
        return jax.lax.scan(lambda x, _: (attention(x, x, x, backend=backend), None), q, length=2)[0].sum()

    with jax.set_mesh(jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))):
        gradients = [jax.jit(jax.grad(functools.partial(loss, backend=name)))(q) for name in ("splash", "xla")]
    assert attention_backends._failure.cache_info().misses == 1
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-5)


def test_explicit_mask_for_cudnn_is_who_sees_whom():
    segments = np.array([[1, 1, 2, 2, 2, 0], [5, 5, 5, 5, 5, 5]])
    mask = explicit_mask(4, 6, segments, 3)
    assert mask.shape == (2, 1, 4, 6)
    for b in range(2):
        for i, query in enumerate(range(2, 6)):
            for key in range(6):
                sees = key <= query and query - key < 3 and segments[b, query] == segments[b, key]
                assert mask[b, 0, i, key] == sees
    assert explicit_mask(4, 6, None, None).shape == (1, 1, 4, 6)


def test_cudnn_is_always_told_of_segments_and_of_earlier_keys(monkeypatch):
    """Its arguments, run by JAX's other implementation, give the reference: nothing is left to be ignored."""
    original, calls = jax.nn.dot_product_attention, []

    def on_xla(*args, implementation, **arguments):
        assert implementation == "cudnn"
        calls.append(arguments)
        return original(*args, **arguments, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, 12, 2, 8)), jnp.bfloat16) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(2, 12, 4, 8)), jnp.bfloat16)
    segments = np.sort(rng.integers(0, 3, (2, 12)))
    for t, ids, window in [(12, None, None), (12, None, 5), (12, segments, 5), (4, None, None), (4, segments, 5)]:
        found, true = (f(q[:, -t:], k, v, segments_bs=ids, window=window) for f in (cudnn_attention, causal_attention))
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(true, np.float32), atol=0.03)
    assert ["mask" in arguments for arguments in calls] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("dtype", "d_head", "length", "sentence"),
    [
        ("float32", 64, 8, "takes bfloat16 or float16 and the model computes in float32; set model.dtype"),
        ("bfloat16", 12, 8, "takes heads of at most 256 in multiples of 8 and attention.d_head is 12"),
        ("bfloat16", 8, 7, "takes segments in rows of even length and the row has 7 tokens"),
    ],
)
def test_cudnn_refuses_what_it_cannot_do(dtype, d_head, length, sentence):
    q = jnp.zeros((1, length, 2, d_head), dtype)
    with pytest.raises(ConfigError) as error:
        cudnn_attention(q, q, q, segments_bs=jnp.zeros((1, length), jnp.int32))
    assert str(error.value).startswith(f"attention.backend 'cudnn' {sentence}")


@pytest.mark.gpu
def test_cudnn_on_a_gpu_is_right():
    assert difference("cudnn", jax.devices("gpu")[0]) is None


def test_splash_takes_what_attention_is_given():
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 128, 2, 8)), jnp.float32)
    found = attention(q, q, q, window=9, backend="splash")
    np.testing.assert_array_equal(found, splash_attention(q, q, q, window=9, interpret=True))
