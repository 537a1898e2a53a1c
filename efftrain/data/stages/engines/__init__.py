"""Provides engines that run the items of a stage: ``Local`` in processes of this machine, ``Beam`` on Apache Beam."""

from efftrain.data.stages.engines.beam import Beam
from efftrain.data.stages.engines.local import Local

__all__ = ["Beam", "Local"]
