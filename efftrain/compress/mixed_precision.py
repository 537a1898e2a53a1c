"""Which layers bear fewer bits: formats chosen for each of them under a budget of bytes, by what they cost in quality.

Each part of each layer is tried alone in each format, on held-out text, while all others have the first one; then
parts are moved on, cheapest first, until the bytes fit. Greedy: costs are taken to add up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.compress.quantize import stored_bytes
from efftrain.errors import ConfigError
from efftrain.measure.kept import Kept
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import QuantizationRule, matrices
from efftrain.ops.quantize import AnyFormat, fake_quantize, format_name, quantize
from efftrain.progress import Progress

Part = tuple[int, str]  # number of the layer, first word of the matrices' names in it: (3, "attention")


@dataclass(frozen=True)
class Choice:
    """Rules for the model with every layer in its pattern, and why.

    Attributes:
      rules: one for each format that is used.
      costs: part and format -> bits per byte above those of the first format everywhere.
      share: bytes of the matrices over those in float32.
    """

    rules: tuple[QuantizationRule, ...]
    costs: dict[str, float]
    share: float

    def as_json(self) -> dict[str, Any]:
        return {
            "rules": {r.layers: format_name(r.weights) for r in self.rules},
            "costs": self.costs,
            "share": self.share,
        }


def choose_formats(
    model: Decoder,
    formats: Sequence[AnyFormat],
    budget: float,
    bpb: Callable[[Decoder], float],
    kept: Kept,
) -> Choice:
    """Chooses a format for each part of each block; embedding and head stay float.

    Args:
      model: float.
      formats: from the one of most bytes to that of least.
      budget: the most bytes of the matrices, as a share of float32.
      bpb: bits per byte on held-out text; called for the first format, and for each part in each later one.
      kept: what was measured before.

    Raises:
      ConfigError: the budget is too small for the last format.
    """
    values = _Values(model, formats)
    parts = values.parts()
    at = dict.fromkeys(parts, 0)
    least = values.share(dict.fromkeys(parts, len(formats) - 1))
    if budget < least:
        raise ConfigError(
            f"--budget {budget} is below {least:.4f}, the share of {format_name(formats[-1])} everywhere; give more or "
            "a format of fewer bits"
        )
    base = kept.cell("first format", lambda: bpb(values.model(at)))
    costs: dict[tuple[Part, int], float] = {}
    with Progress("sensitivity", len(parts) * (len(formats) - 1), unit="trials") as progress:
        for part in parts:
            for i in range(1, len(formats)):
                name = _name(part, formats[i])
                progress.note(name)
                costs[part, i] = kept.cell(name, lambda part=part, i=i: bpb(values.model(at | {part: i}))) - base
                progress.advance()

    def price(part: Part) -> float:
        """Bits per byte for a byte saved by the next format."""
        now, after = at[part], at[part] + 1
        saved = values.bytes_of(part, now) - values.bytes_of(part, after)
        return (costs[part, after] - costs.get((part, now), 0.0)) / saved

    while values.share(at) > budget:
        at[min((part for part in parts if at[part] + 1 < len(formats)), key=price)] += 1
    used = sorted(set(at.values()))
    rules = tuple(QuantizationRule(layers=_pattern([p for p in parts if at[p] == i]), weights=formats[i]) for i in used)
    named = {_name(part, formats[i]): cost for (part, i), cost in costs.items()}
    return Choice(rules, named, values.share(at))


class _Values:
    """A model's matrices with the values that each format leaves of them."""

    def __init__(self, model: Decoder, formats: Sequence[AnyFormat]):
        self._graph, self._state = nnx.split(model)
        self._n_positions = len(model.config.pattern)
        self._matrices: dict[str, list[Array]] = {}  # values by format, layers stacked
        self._bytes: dict[str, tuple[int, list[int]]] = {}  # of one layer: float32, by format
        for name, module, attribute in matrices(model):
            if name.startswith("blocks/"):
                variable = getattr(module, attribute)
                axis = variable.get_metadata()["contraction"]
                self._matrices[name] = [fake_quantize(variable[...], format, axis) for format in formats]
                sizes = [stored_bytes(quantize(variable[0], format, axis)) for format in formats]
                self._bytes[name] = variable[0].size * 4, sizes

    def parts(self) -> list[Part]:
        found = set()
        for name, values in self._matrices.items():
            _, position, word, *_ = name.split("/")
            found |= {(repeat * self._n_positions + int(position), word) for repeat in range(len(values[0]))}
        return sorted(found)

    def model(self, at: dict[Part, int]) -> Decoder:
        """The model with each part in its format."""
        model = nnx.merge(self._graph, self._state)
        for name, module, attribute in list(matrices(model)):
            if name in self._matrices:
                _, position, word, *_ = name.split("/")
                values = self._matrices[name]
                chosen = [
                    values[at[repeat * self._n_positions + int(position), word]][repeat]
                    for repeat in range(len(values[0]))
                ]
                getattr(module, attribute)[...] = jnp.stack(chosen)
        return model

    def bytes_of(self, part: Part, i: int) -> int:
        return sum(sizes[i] for _, sizes in self._of(part))

    def share(self, at: dict[Part, int]) -> float:
        whole = sum(n for part in at for n, _ in self._of(part))
        return sum(self.bytes_of(part, i) for part, i in at.items()) / whole

    def _of(self, part: Part) -> list[tuple[int, list[int]]]:
        number, word = part
        prefix = f"blocks/{number % self._n_positions}/{word}"
        return [sizes for name, sizes in self._bytes.items() if name == prefix or name.startswith(f"{prefix}/")]


def _name(part: Part, format: AnyFormat) -> str:
    return f"layer {part[0]} {part[1]} in {format_name(format)}"


def _pattern(parts: Sequence[Part]) -> str:
    """A regular expression for the matrices of these parts."""
    words = sorted({word for _, word in parts})
    either = [f"({'|'.join(str(n) for n, w in parts if w == word)})/{word}(/.*)?" for word in words]
    return rf"blocks/({'|'.join(either)})"
