"""Eight fake CPU devices, programs compiled without optimisation, and kept between runs.

Set in the environment: before JAX starts, and for the subprocesses of tests too.
"""

import gc
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

FAKE_DEVICES = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if FAKE_DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAKE_DEVICES}=8".strip()

# Most of the tests' time is compilation: without optimisation, fusions as plain LLVM code (half the time of the MLIR
# emitters), and a program in one part, not 32. libtpu ends the process over flags that it does not know.
flags = ["backend_optimization_level=0"]
if find_spec("libtpu") is None:
    flags += ["cpu_use_fusion_emitters=false", "cpu_parallel_codegen_split_count=1"]
for flag in flags:
    if f"--xla_{flag.partition('=')[0]}" not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" --xla_{flag}"

# Programs name no lines of source: writing ten frames for each operation is a twelfth of the tests' time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Recipes start themselves again for huge pages unless this is set, and so import everything twice.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")

cache = Path(tempfile.gettempdir()) / f"efftrain-test-cache-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # operations outside of jit are many and small


MOST_MEMORY = 1.5 * 2**30


@pytest.fixture(scope="module", autouse=True)
def _programs_go_when_memory_is_short():
    """A worker that keeps all compiled programs holds gigabytes in the end; one that keeps none compiles them again."""
    yield
    if "jax" in sys.modules and resident_bytes() > MOST_MEMORY:
        sys.modules["jax"].clear_caches()
        gc.collect()


def resident_bytes() -> int:
    """Memory of this process; where the system does not say, more than there may be."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 2 * int(MOST_MEMORY)
