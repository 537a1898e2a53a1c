"""Eight fake CPU devices, programs compiled without optimisation, and kept between runs.

Set in the environment: before JAX starts, and for the subprocesses of tests too.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

FAKE_DEVICES = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if FAKE_DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAKE_DEVICES}=8".strip()

if "--xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # most of the tests' time is compilation

# Recipes start themselves again for huge pages unless this is set, and so import everything twice.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")

cache = Path(tempfile.gettempdir()) / f"efftrain-test-cache-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # operations outside of jit are many and small


@pytest.fixture(scope="module", autouse=True)
def _programs_go_with_their_module():
    """A worker that keeps every compiled program holds gigabytes in the end, and its garbage takes long to collect."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
