"""The most memory that was held at once, as the system or the device counted it."""

import sys
from pathlib import Path

import jax


def host_peak_bytes() -> int | None:
    """Peak resident memory of this process since it started; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone: Linux's getrusage counts that of the process which started it too
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
    """Peak of the fullest accelerator of this process; None where the device does not say (every CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)
