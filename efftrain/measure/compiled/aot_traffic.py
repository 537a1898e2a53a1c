"""Traffic of a compiled step: its collectives, summed by kind, mesh axes and whether they are in a loop."""

from dataclasses import dataclass

from jax.sharding import Mesh

from efftrain.measure.compiled.hlo import ProgramText
from efftrain.measure.compiled.replica_groups import group_axes
from efftrain.sharding.roofline import sent_bytes


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The collectives of one kind along the same mesh axes.

    Attributes:
      kind: one of ``hlo.KINDS``.
      axes: the mesh axes along which devices exchange data.
      count: number of collectives in a step.
      sent: bytes that one device sends in a step.
      largest: bytes of the whole result of the largest collective; see ``hlo.Collective.size``.
      in_loop: whether they are in the body of a loop.
      source: the JAX operation that one of them comes from.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    sent: float
    largest: float
    in_loop: bool
    source: str


def traffic(text: ProgramText, mesh: Mesh) -> list[Traffic]:
    """Sums the collectives of a program by kind, mesh axes and whether they are in a loop; most bytes first."""
    groups: dict[tuple, list] = {}
    for c in text.collectives:
        groups.setdefault((c.kind, group_axes(c.group, mesh), c.in_loop), []).append(c)
    rows = [
        Traffic(
            kind=kind,
            axes=axes,
            count=sum(c.count for c in same),
            sent=sum(c.count * sent_bytes(c.kind, c.size, len(c.group) or mesh.size) for c in same),
            largest=max(c.size for c in same),
            in_loop=in_loop,
            source=same[0].source,
        )
        for (kind, axes, in_loop), same in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.sent)
