"""Attention with a choice of kernels: by the platform of the mesh, and compared with the reference before use."""

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from efftrain.errors import ConfigError
from efftrain.ops.attention import causal_attention
from efftrain.ops.attention_cudnn import attached_capability, cudnn_attention, refusal
from efftrain.ops.attention_splash import splash_attention
from efftrain.ops.platform import platform

Backend = Literal["auto", "xla", "splash", "cudnn"]
LONGEST_CHECK = 4096  # tokens in a check: the reference holds the scores of four heads
PLATFORM: dict[Backend, str] = {"splash": "tpu", "cudnn": "gpu"}  # where each kernel runs; xla runs everywhere


def attention(
    q_bthd: Array,
    k_bskd: Array,
    v_bskd: Array,
    *,
    segments_bs: Array | None = None,
    window: int | None = None,
    backend: Backend = "auto",
    n_blocks: int = 4,
) -> Array:
    """Softmax attention of each token to itself and earlier tokens of its segment, computed by the chosen kernel.

    It operates on the part of one device. On a mesh, ``efftrain.sharding.context`` calls it for each device's part.

    Args:
      q_bthd: (batch, t, heads, d_head), the last t of the s tokens.
      k_bskd: (batch, s, kv_heads, d_head); heads is a multiple of kv_heads.
      v_bskd: like k.
      segments_bs: (batch, s) integers. None: one segment per row.
      window: number of latest tokens that a token sees, itself included. None: all.
      backend: "auto": see ``choose_backend``. "xla": query blocks in plain JAX. "splash": the Pallas kernel for TPU,
        interpreted on CPU (slow, for tests). "cudnn": cuDNN's flash kernels.
      n_blocks: number of query blocks of "xla".

    Returns:
      (batch, t, heads, d_head) in q's dtype; scores and sums are float32.

    Raises:
      ConfigError: the backend cannot compute this, or gives wrong results on this device.
    """
    backend = choose_backend(backend, q_bthd.dtype, q_bthd.shape[-1], q_bthd.shape[1])
    kernel = _kernel(backend, platform(), n_blocks)
    return kernel(q_bthd, k_bskd, v_bskd, segments_bs=segments_bs, window=window)


def _kernel(backend: Backend, platform: str, n_blocks: int = 4) -> Callable[..., Array]:
    if backend == "splash":
        return functools.partial(splash_attention, interpret=platform != "tpu")
    return cudnn_attention if backend == "cudnn" else functools.partial(causal_attention, n_blocks=n_blocks)


def choose_backend(backend: Backend, dtype: Any, d_head: int, length: int) -> Backend:
    """Returns the kernel that ``attention`` runs, never "auto".

    A kernel is checked if a device of its platform is attached (compiling for a topology that is not attached checks
    nothing), once per process for each head size and each power of two into which the length fits.

    Args:
      backend: "auto" selects splash on TPU and cuDNN on GPU. If cuDNN does not support the dtype, the head size or the
        row on this GPU, or if a kernel fails its check, it selects xla and warns. Several processes must agree on the
        outcome of a check, so that for them a failed check is an error.
      dtype: dtype of the queries.
      d_head: size of a head.
      length: number of queries on a device.

    Raises:
      ConfigError: the name is unknown, or the kernel is for another platform, does not support this shape on this GPU,
        or has failed its check.
    """
    if backend not in get_args(Backend):
        names = ", ".join(map(repr, get_args(Backend)))
        raise ConfigError(f"attention.backend is {backend!r}; use one of {names}")
    if backend == "xla":
        return backend
    here = platform()
    if backend != "auto" and here != PLATFORM[backend] and (backend, here) != ("splash", "cpu"):
        raise ConfigError(
            f"attention.backend is {backend!r}, which needs a {PLATFORM[backend].upper()}, and the devices are {here}; "
            "use 'auto'"
        )
    length_class = min(max(128, 2 ** (length - 1).bit_length()), LONGEST_CHECK if here != "cpu" else 256)
    can = functools.partial(refusal, dtype, d_head, length, length, capability=attached_capability())
    if backend != "auto":
        if backend == "cudnn" and (reason := can(masked=False)):  # ``cudnn_attention`` checks again with segments
            raise ConfigError(f"attention.backend 'cudnn' {reason}")
        if reason := _failure(backend, here, d_head, length_class):
            raise ConfigError(f"{reason}; use attention.backend 'xla', or another version of jax")
        return backend
    chosen: Backend = next((name for name, where in PLATFORM.items() if where == here), "xla")
    # As if the row had segments: the caller may pass them or not, and the choice should be the same for both.
    if chosen == "cudnn" and (reason := can(masked=True)):
        warnings.warn(f"attention.backend 'auto' takes 'xla', because cuDNN {reason}", stacklevel=2)
        return "xla"
    if chosen == "xla" or not (reason := _failure(chosen, here, d_head, length_class)):
        return chosen
    if jax.process_count() > 1:
        raise ConfigError(f"{reason}; set attention.backend to 'xla', so that all processes agree")
    warnings.warn(f"{reason}; attention.backend 'auto' takes 'xla', which is slower", stacklevel=2)
    return "xla"


@functools.cache
def _failure(backend: Backend, platform: str, d_head: int, length: int) -> str | None:
    """Returns the reason why a kernel cannot be used on the attached device (without a final period), or None."""
    try:
        device = jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return None  # not attached: the program is only compiled
    found: list[str | None] = []

    def run() -> None:
        try:
            found.append(difference(backend, device, d_head=d_head, length=length))
        except Exception as error:  # any error of a kernel or its compiler means that it cannot be used
            where = f"on {device.device_kind} with heads of {d_head} in rows of {length}"
            found.append(f"attention.backend {backend!r} does not run {where}: {error}".split("\n")[0])

    # In a thread of its own, which is outside the mesh and the trace in which the kernel is first used.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def difference(backend: Backend, device: jax.Device, *, d_head: int = 64, length: int = 256) -> str | None:
    """Compares a kernel with float32 on two packed rows with a window and grouped heads, including gradients.

    Args:
      backend: the kernel.
      device: the device that runs it.
      d_head: size of a head.
      length: length of a row.

    Returns:
      A sentence without a final period if the results differ by more than bfloat16 rounding; None if they agree.
    """
    rng = np.random.default_rng(0)
    heads, kv_heads = 4, 2
    shapes = [(2, length, n, d_head) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, direction = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    segments = (np.arange(length) >= rng.integers(1, length, (2, 3, 1))).sum(1).astype(np.int32)

    def results(attend, qkv, segments, window):
        def weighted(q, k, v):
            out = attend(q, k, v, segments_bs=segments, window=window)
            return (out.astype(jnp.float32) * direction).sum(), out

        (_, out), gradients = jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)(*qkv)
        return out, *gradients

    with jax.default_device(device):
        names = ("output", "gradient of q", "gradient of k", "gradient of v")
        rounded = [jnp.asarray(a, jnp.bfloat16) for a in qkv]
        for name, ids, window in (("segments and a window", segments, 33), ("whole rows", None, None)):
            run = jax.jit(results, static_argnums=(0, 3))
            with jax.default_matmul_precision("highest"):
                truth = run(causal_attention, [a.astype(jnp.float32) for a in rounded], ids, window)
            tried = run(_kernel(backend, device.platform), rounded, ids, window)
            for what, a, b in zip(names, tried, truth, strict=True):
                error = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
                if not error < 0.03:
                    return (
                        f"attention.backend {backend!r} differs from the reference in the {what} for {name} on "
                        f"{device.device_kind} (relative error {error:.2g})"
                    )
    return None
