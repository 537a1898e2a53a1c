"""Where a program will run."""

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the devices of the current mesh, attached or not; without a mesh, JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device
    return getattr(device, "platform", device) or jax.default_backend()
