"""Where the items of a stage run: ``Local`` processes of this machine, or ``Beam``."""

from efftrain.data.stages.engines.beam import Beam
from efftrain.data.stages.engines.local import Local

__all__ = ["Beam", "Local"]
