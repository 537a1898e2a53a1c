"""The roofline of a step: the least time for compute, memory and links at their peak, of which the slowest decides.

Formulas: Austin et al. 2025, "How to Scale Your Model" (jax-ml.github.io/scaling-book), parts 1 to 3. The prediction is
a lower bound of the time: kernels do not reach the peak, and a collective overlaps with compute only in part.
"""

from dataclasses import dataclass

from jax.sharding import Mesh

from efftrain.errors import ConfigError
from efftrain.sharding.chips import Chip
from efftrain.sharding.topologies import Topology


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds that each part of a step needs at its peak."""

    compute_s: float
    hbm_s: float
    ici_s: float

    @property
    def step_s(self) -> float:
        """Seconds of the slowest part; the others are assumed to overlap with it."""
        return max(self.compute_s, self.hbm_s, self.ici_s)

    @property
    def dominant(self) -> str:
        return max((("compute", self.compute_s), ("HBM", self.hbm_s), ("ICI", self.ici_s)), key=lambda term: term[1])[0]


def roofline(chip: Chip, *, flops: float, hbm_bytes: float, ici_s: float) -> Roofline:
    """Returns the roofline of one device's share of a step.

    Args:
      chip: peak figures of the device.
      flops: FLOPs of the device.
      hbm_bytes: bytes read from and written to its memory.
      ici_s: seconds on its links.
    """
    return Roofline(compute_s=flops / chip.bf16_flops, hbm_s=hbm_bytes / chip.hbm_bytes_per_s, ici_s=ici_s)


def sent_bytes(kind: str, size: float, n: int) -> float:
    """Returns the bytes that each device sends for one collective over ``n`` devices by the ring algorithm.

    Args:
      kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
      size: bytes of the whole array: the gathered result, the input that is scattered, the array that is reduced, or
        one device's input of an all-to-all or permute.
      n: number of devices that take part.
    """
    if kind == "collective-permute":
        return float(size)
    rounds = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}[kind]
    return rounds * size * (n - 1) / n


def axis_bandwidth(topology: Topology, mesh: Mesh, axes: tuple[str, ...]) -> float:
    """Returns the bytes/s that one device can send to the others along mesh axes.

    On a torus, each physical dimension along which the axes run gives two links if it closes to a ring that the axes
    cover, and one link otherwise.

    Raises:
      ConfigError: the bandwidth of the chip is not known.
    """
    chip = topology.chip
    if chip is None or chip.link_bytes_per_s is None:
        raise ConfigError(f"the bandwidth between the devices of {topology.name} is not known; choose a TPU topology")
    if not topology.shape:
        return chip.link_bytes_per_s
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    coordinates = [device.coords for device in mesh.devices[index].flat]
    links = 0
    for dim, (size, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True)):
        covered = len({c[dim] for c in coordinates})
        links += (2 if wraps and covered == size else 1) if covered > 1 else 0
    return max(links, 1) * chip.link_bytes_per_s
