"""Devices that this CPU pretends to have."""

import os

from efftrain.errors import ConfigError


def fake_devices(count: int) -> None:
    if count < 1:
        raise ConfigError(f"--fake-devices is {count}; give a positive number")
    # XLA reads this once, when the first device is requested; of two such flags the last one counts.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
