"""Peak memory of this process, as the operating system or the device reports it."""

import sys
from pathlib import Path

import jax


def host_peak_bytes() -> int | None:
    """Peak resident memory of this process since it started, in bytes; None if the system does not report it."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage would also count the peak of the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # getrusage(2): kilobytes, but bytes on macOS


def device_peak_bytes() -> int | None:
    """Highest peak memory of this process's accelerators, in bytes; None if the device reports none, such as a CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)
