"""Mixed precision: chooses a number format for each part of each layer under a budget of bytes.

First the sensitivity is measured: each part of each layer is tried in each smaller format on held-out text, while all
other parts have the largest format. Then parts move to their next smaller format, the one with the lowest loss of
quality per byte first, until the bytes fit. This is greedy: the costs of the parts are assumed to add up.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from efftrain.compress.quantization.convert import quantized_bytes
from efftrain.errors import ConfigError
from efftrain.measure.measurements import Measurements
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import QuantizationRule, in_float, matrices
from efftrain.ops.number_formats import AnyFormat, format_name
from efftrain.ops.quantize import fake_quantize, quantize
from efftrain.progress import Progress

Part = tuple[int, str]  # number of the layer, and first word of the matrices' names in it, such as (3, "attention")


@dataclass(frozen=True)
class ChosenFormats:
    """The rules that were chosen, for a model with every layer in its pattern, and the measurements that led to them.

    Attributes:
      rules: one rule for each format that is used.
      costs: increase in bits per byte over the model with the largest format everywhere, by the name of part and
        format.
      share: bytes of the matrices over their bytes in float32.
    """

    rules: tuple[QuantizationRule, ...]
    costs: dict[str, float]
    share: float

    def as_json(self) -> dict[str, Any]:
        return {
            "rules": {r.layers: format_name(r.weights) for r in self.rules if r.weights is not None},
            "costs": self.costs,
            "share": self.share,
        }


def choose_formats(
    model: Decoder,
    formats: Sequence[AnyFormat],
    budget: float,
    bpb: Callable[[Decoder], float],
    kept: Measurements,
) -> ChosenFormats:
    """Chooses a number format for each part of each block; embedding and head stay float.

    Args:
      model: a float model.
      formats: two or more formats that take different numbers of bytes, in any order.
      budget: the most bytes that the matrices may take, as a share of their bytes in float32.
      bpb: returns the bits per byte of a model on held-out text; called for the model in the largest format, and once
        for each part in each smaller format.
      kept: measurements of an earlier call that was interrupted; new ones are added.

    Raises:
      ConfigError: the budget is too small for the smallest format, two formats take the same number of bytes, or the
        model has no finite bits per byte in the largest format.
    """
    values = _Values(model, formats)
    formats, parts = values.formats, values.parts
    shares = [values.share(dict.fromkeys(parts, i)) for i in range(len(formats))]
    for (larger, smaller), (more, less) in zip(itertools.pairwise(formats), itertools.pairwise(shares), strict=True):
        if more == less:
            names = f"{format_name(larger)} and {format_name(smaller)}"
            raise ConfigError(f"--weights: {names} take the same number of bytes; remove one of them")
    if budget < shares[-1]:
        raise ConfigError(
            f"--budget {budget} is below {shares[-1]:.4f}, the share with {format_name(formats[-1])} in all blocks; "
            "give a larger budget, or a format of fewer bits"
        )
    at, costs = dict.fromkeys(parts, 0), {}
    if budget < shares[0]:
        costs = _costs(values, bpb, kept)

    def price(part: Part) -> float:
        """Increase in bits per byte for each byte that the next smaller format of the part saves."""
        now, after = at[part], at[part] + 1
        if math.isinf(costs[part, after]):
            return math.inf
        saved = values.bytes_of(part, now) - values.bytes_of(part, after)
        return (costs[part, after] - costs.get((part, now), 0.0)) / saved

    while values.share(at) > budget:
        at[min((part for part in parts if at[part] + 1 < len(formats)), key=price)] += 1
    used = sorted(set(at.values()))
    rules = tuple(QuantizationRule(layers=_pattern([p for p in parts if at[p] == i]), weights=formats[i]) for i in used)
    named = {_name(part, formats[i]): cost for (part, i), cost in costs.items()}
    return ChosenFormats(rules, named, values.share(at))


def _costs(values: "_Values", bpb: Callable[[Decoder], float], kept: Measurements) -> dict[tuple[Part, int], float]:
    """Increase in bits per byte for each part alone in each smaller format; infinity if the result is not finite."""
    formats, parts, first, costs = values.formats, values.parts, dict.fromkeys(values.parts, 0), {}
    base = kept.cell("first format", lambda: bpb(values.model(first)))
    if base is None:
        raise ConfigError(
            f"--weights: the model has no finite bits per byte in {format_name(formats[0])}, the largest format; add "
            "a format of more bits"
        )
    with Progress("sensitivity", len(parts) * (len(formats) - 1), unit="trials") as progress:
        for part in parts:
            for i in range(1, len(formats)):
                name = _name(part, formats[i])
                progress.note(name)
                found = kept.cell(name, lambda part=part, i=i: bpb(values.model(first | {part: i})))
                costs[part, i] = math.inf if found is None else found - base
                progress.advance()
    return costs


class _Values:
    """The matrices of a model, rounded to each format.

    Attributes:
      formats: ordered from most to fewest bytes.
      parts: the parts of all layers.
    """

    def __init__(self, model: Decoder, formats: Sequence[AnyFormat]):
        self._float = in_float(model)
        self._n_positions = len(model.config.pattern)
        found = {name: getattr(m, a) for name, m, a in matrices(self._float) if name.startswith("blocks/")}

        def size(variable: nnx.Variable, format: AnyFormat) -> int:
            return quantized_bytes(quantize(variable[0], format, variable.get_metadata()["contraction"]))

        self.formats = sorted(formats, key=lambda format: -sum(size(v, format) for v in found.values()))
        # Bytes of one layer: in float32, and in each format.
        self._bytes = {n: (v[0].size * 4, [size(v, format) for format in self.formats]) for n, v in found.items()}
        self._matrices = {
            name: [fake_quantize(v[...], format, v.get_metadata()["contraction"]) for format in self.formats]
            for name, v in found.items()
        }
        self.parts: list[Part] = sorted(
            {
                (repeat * self._n_positions + int(name.split("/")[1]), name.split("/")[2])
                for name, v in found.items()
                for repeat in range(len(v[...]))
            }
        )

    def model(self, at: dict[Part, int]) -> Decoder:
        """The model with each part in its format."""
        model = in_float(self._float)
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
    """A regular expression that matches the names of the matrices of these parts."""
    words = sorted({word for _, word in parts})
    either = [f"({'|'.join(str(n) for n, w in parts if w == word)})/{word}(/.*)?" for word in words]
    return rf"blocks/({'|'.join(either)})"
