"""The norms of a model: root mean square or layer normalisation."""

from dataclasses import dataclass

from flax import nnx

from efftrain.models.components import NormConfig
from efftrain.models.linear import CentredNorm, RMSNorm


@dataclass(frozen=True, kw_only=True)
class RMS(NormConfig):
    """Root mean square normalisation. Zhang and Sennrich 2019.

    Attributes:
      zero_centered: multiply with ``1 + scale``, where the stored scale starts at zero (Gemma).
    """

    zero_centered: bool = False

    def build(self, size: int, *, eps: float, axis: str = "norm", units: int | None = None) -> nnx.Module:
        return RMSNorm(size, eps=eps, axis=axis, units=units, zero_centered=self.zero_centered)

    def of_heads(self) -> NormConfig:
        return self


@dataclass(frozen=True, kw_only=True)
class LayerNorm(NormConfig):
    """Layer normalisation (GPT-2, Phi-2); queries and keys have RMS norms. Ba et al. 2016.

    Attributes:
      bias: add a learned bias.
    """

    bias: bool = True

    def build(self, size: int, *, eps: float, axis: str = "norm", units: int | None = None) -> nnx.Module:
        return CentredNorm(size, eps=eps, axis=axis, units=units, bias=self.bias)

    def of_heads(self) -> NormConfig:
        return RMS()
