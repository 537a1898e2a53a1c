"""Peak figures of accelerators from the vendors' data sheets, the denominators of utilisation."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak figures of one device as JAX sees it.

    Attributes:
      name: name of the chip.
      bf16_flops: dense peak, FLOP/s.
      hbm_bytes: size of the memory.
      hbm_bytes_per_s: bandwidth of the memory.
      link_bytes_per_s: bandwidth to the other chips of its slice (TPU: over one link in one direction; a chip has two
        links along each dimension of the torus) or of its host (NVIDIA: NVLink, one direction). None: not known.
    """

    name: str
    bf16_flops: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float | None = None


# TPU: cloud.google.com/tpu/docs (not v2 and v3, where a device is half a chip); links: jax-ml.github.io/scaling-book,
# "TPU specs". NVIDIA: data sheets, SXM, dense.
_V5P = Chip(name="v5p", bf16_flops=459e12, hbm_bytes=95e9, hbm_bytes_per_s=2.765e12, link_bytes_per_s=90e9)
CHIPS = {
    "TPU v4": Chip(name="v4", bf16_flops=275e12, hbm_bytes=32e9, hbm_bytes_per_s=1.228e12, link_bytes_per_s=45e9),
    "TPU v5 lite": Chip(name="v5e", bf16_flops=197e12, hbm_bytes=16e9, hbm_bytes_per_s=0.819e12, link_bytes_per_s=45e9),
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": Chip(name="v6e", bf16_flops=918e12, hbm_bytes=32e9, hbm_bytes_per_s=1.64e12, link_bytes_per_s=90e9),
    "NVIDIA A100-SXM4-40GB": Chip(
        name="a100-40", bf16_flops=312e12, hbm_bytes=40e9, hbm_bytes_per_s=1.555e12, link_bytes_per_s=300e9
    ),
    "NVIDIA A100-SXM4-80GB": Chip(
        name="a100-80", bf16_flops=312e12, hbm_bytes=80e9, hbm_bytes_per_s=2.039e12, link_bytes_per_s=300e9
    ),
    "NVIDIA H100 80GB HBM3": Chip(
        name="h100", bf16_flops=989e12, hbm_bytes=80e9, hbm_bytes_per_s=3.35e12, link_bytes_per_s=450e9
    ),
    "NVIDIA H200": Chip(
        name="h200", bf16_flops=989e12, hbm_bytes=141e9, hbm_bytes_per_s=4.8e12, link_bytes_per_s=450e9
    ),
}


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of a ``jax.Device.device_kind``; None if its peak is not known (as for every CPU)."""
    return CHIPS.get(device_kind)
