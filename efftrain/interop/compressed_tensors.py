"""The format of the package compressed-tensors, in which vLLM and transformers read quantised matrices.

A matrix has ``weight`` (levels), or ``weight_packed`` (levels in words of 32 bits) and ``weight_shape``, and
``weight_scale``: its rows are outputs. The value is ``level * scale``, in the dtype of the scales, which is therefore
float32 here. Which modules are stored how is in ``quantization_config`` of the ``config.json``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from efftrain.errors import ConfigError
from efftrain.interop.architecture import EXPERT, Architecture, FileTensor, Piece, layout
from efftrain.interop.run_arrays import SCALE, variable_name
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.models.quantization import Quantization, matrices, rule_of
from efftrain.ops.number_formats import Float8, Format, Ternary, format_name
from efftrain.ops.quantize import group_size

WORD = 32  # bits
GROUPS = (32, 64, 128)  # that the kernels of vLLM support


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored, and its inputs are rounded.

    Attributes:
      weights: number format of the matrix.
      activations: number format of its inputs, with one scale per token. None: float.
    """

    weights: Format
    activations: Format | None

    @property
    def format(self) -> str:
        """The name that compressed-tensors gives to the form of the files."""
        if isinstance(self.weights, Float8):
            return "float-quantized"
        return "pack-quantized" if self.activations is None else "int-quantized"

    def as_json(self, targets: Sequence[str]) -> dict[str, Any]:
        """Returns the entry of ``config_groups``."""
        group = self.weights.group
        weights = _arguments(self.weights) | {"dynamic": False, "strategy": "channel" if group is None else "group"}
        inputs = None
        if self.activations is not None:
            inputs = _arguments(self.activations) | {"dynamic": True, "strategy": "token"}
            inputs["scale_dtype"] = f"torch.{self.activations.scale_dtype}"
        return {
            "targets": list(targets),
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }


def _arguments(format: Format) -> dict[str, Any]:
    kind = "float" if isinstance(format, Float8) else "int"
    return {"num_bits": format.storage_bits, "type": kind, "symmetric": True, "group_size": format.group}


@dataclass(frozen=True, kw_only=True)
class CompressedTensors:
    """The quantised files of a model.

    Attributes:
      tensors: what is read from the run: matrices, of quantised ones the levels and the scales, and everything else.
      schemes: name of a module in the files -> how its matrix is stored; modules that are missing stay float.
      settings: the field ``quantization_config`` of the ``config.json``.
      notes: what programs may not do with these files, as sentences.
    """

    tensors: tuple[FileTensor, ...]
    schemes: Mapping[str, Scheme]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    def entries(self) -> dict[str, tuple[str, np.dtype, tuple[int, ...]]]:
        """Returns the tensors of the files, as ``SafetensorsWriter`` takes them."""
        found: dict[str, tuple[str, np.dtype, tuple[int, ...]]] = {}
        for tensor in self.tensors:
            module, _, leaf = tensor.name.rpartition(".")
            scheme = self.schemes.get(module) if leaf == "weight" else None
            if scheme is None:
                found[tensor.name] = "F32", np.dtype(np.float32), tensor.shape
            elif scheme.format == "pack-quantized":
                d_out, d_in = tensor.shape
                words = -(-d_in * scheme.weights.storage_bits // WORD)
                found[f"{module}.weight_packed"] = "I32", np.dtype(np.int32), (d_out, words)
                found[f"{module}.weight_shape"] = "I64", np.dtype(np.int64), (2,)
            elif scheme.format == "float-quantized":
                found[tensor.name] = "F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn), tensor.shape
            else:
                found[tensor.name] = "I8", np.dtype(np.int8), tensor.shape
        return found

    def encode(self, name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of the files that hold one of ``tensors``."""
        module, _, leaf = name.rpartition(".")
        scheme = self.schemes.get(module) if leaf == "weight" else None
        if scheme is None or scheme.format != "pack-quantized":
            yield name, array
            return
        yield f"{module}.weight_packed", packed(array, scheme.weights.storage_bits)
        yield f"{module}.weight_shape", np.asarray(array.shape, np.int64)


def packed(levels: np.ndarray, bits: int) -> np.ndarray:
    """Packs signed levels into int32 words along the last axis, the first level in the lowest bits, with an offset.

    Args:
      levels: (rows, columns) int8.
      bits: of a level; divides 32.
    """
    per_word = WORD // bits
    rows, columns = levels.shape
    unsigned = np.zeros((rows, -(-columns // per_word) * per_word), np.uint32)
    unsigned[:, :columns] = levels.astype(np.int32) + (1 << (bits - 1))
    words = np.zeros((rows, unsigned.shape[1] // per_word), np.uint32)
    for i in range(per_word):
        words |= unsigned[:, i::per_word] << np.uint32(bits * i)
    return words.view(np.int32)


def compressed_tensors(
    architecture: Architecture, exported: ModelConfig, quantization: Quantization
) -> CompressedTensors:
    """Decides how the matrices of a quantised model are stored.

    Args:
      architecture: as what the model is exported.
      exported: configuration of what is exported, without quantisation.
      quantization: the rules of the model.

    Raises:
      ConfigError: the format cannot express the rules, or no rule quantises a matrix.
    """
    schemes_of = _schemes(exported, quantization)
    if not schemes_of:
        raise ConfigError(
            "quantization.rules quantises no weights; make a run that does with efftrain compress quantize"
        )
    if not architecture.transposed:
        raise ConfigError(
            f"compressed-tensors stores the matrices of Linear modules, and {architecture.name} has others"
        )
    tensors: list[FileTensor] = []
    schemes: dict[str, Scheme] = {}
    stay: list[str] = []
    for tensor in layout(architecture, exported):
        module, _, leaf = tensor.name.rpartition(".")
        found = {schemes_of.get(piece.variable) for piece in tensor.pieces}
        tensors.append(tensor)
        if leaf != "weight" or len(tensor.shape) < 2:
            continue
        if len(found) > 1:
            raise ConfigError(
                f"quantization.rules gives parts of {module} different formats, and {architecture.name} has one "
                f"matrix for them; use one format for them"
            )
        (scheme,) = found
        if scheme is None:
            stay.append(module)
            continue
        schemes[module] = scheme
        tensors.append(_scales(tensor, scheme))
    if exported.tied_embedding:
        stay.append(architecture.outer["head"])
    patterns = _of_experts(architecture)
    float_experts = [name for name in stay if any(re.match(pattern, name) for pattern in patterns)]
    if float_experts and not any(re.match(pattern, name) for name in schemes for pattern in patterns):
        stay = [name for name in stay if name not in set(float_experts)] + [f"re:{pattern}" for pattern in patterns]
    notes = _notes(schemes)
    if float_experts:
        notes += ("transformers 5.24 raises an error for experts that stay float beside quantised matrices.",)
    settings = _settings(schemes, stay, patterns)
    return CompressedTensors(tensors=tuple(tensors), schemes=schemes, settings=settings, notes=notes)


def _schemes(exported: ModelConfig, quantization: Quantization) -> dict[str, Scheme]:
    """The scheme of each quantised variable."""
    found = {}
    model = abstract_decoder(exported.replace(quantization=replace(quantization, stored=False)))
    for name, module, attribute in matrices(model):
        rule = rule_of(getattr(module, attribute))
        if rule is None:
            continue
        weights, activations = rule.weights, rule.activations
        # The inputs of experts, tables and head are always float, see ``QuantizationRule``.
        if not name.startswith("blocks/") or attribute != "kernel":
            activations = None
        if weights is None and activations is None:
            continue
        where = f"quantization.rules: layers {rule.layers!r} has"
        if weights is None:
            raise ConfigError(f"{where} activations without weights; set weights too")
        if attribute == "table":
            raise ConfigError(
                f"{where} weights for {name}, and programs read only products in compressed-tensors; quantise only "
                f"--layers 'blocks/.*'"
            )
        if isinstance(weights, Float8) and weights.group is not None:
            raise ConfigError(
                f"{where} weights {format_name(weights)}, and programs read fp8 with one scale for each output; use fp8"
            )
        if activations is not None and (
            isinstance(activations, Ternary) or isinstance(activations, Float8) != isinstance(weights, Float8)
        ):
            raise ConfigError(
                f"{where} activations {format_name(activations)} with weights {format_name(weights)}; use int8 "
                f"activations with integer weights and fp8 ones with fp8"
            )
        found[variable_name(name, attribute)] = Scheme(weights, activations)
    return found


def _scales(tensor: FileTensor, scheme: Scheme) -> FileTensor:
    """The tensor of the scales of a quantised tensor."""

    def of(piece: Piece) -> Piece:
        d_in, d_out = piece.shape
        return Piece(f"{piece.variable}{SCALE}", piece.index, (d_in // group_size(d_in, scheme.weights), d_out))

    return FileTensor(f"{tensor.name}{SCALE}", tuple(map(of, tensor.pieces)), tensor.transposed)


def _of_experts(architecture: Architecture) -> list[str]:
    """Regular expressions that match the names of modules in experts, and no others."""
    starts = {name.split(EXPERT)[0] for name in architecture.names.values() if EXPERT in name}
    return [f".*{re.escape(start)}.*" for start in sorted(starts)]


def _settings(schemes: Mapping[str, Scheme], stay: Sequence[str], patterns: Sequence[str]) -> dict[str, Any]:
    modules: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        modules.setdefault(scheme, []).append(module)
    targets = {one: ["Linear"] for one in modules} if len(modules) == 1 else _named(modules, patterns)
    formats = {scheme.format for scheme in modules}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": scheme.as_json(named) for i, (scheme, named) in enumerate(targets.items())},
        "ignore": sorted(stay),
    }


def _named(modules: Mapping[Scheme, list[str]], patterns: Sequence[str]) -> dict[Scheme, list[str]]:
    """The modules of several schemes by name; experts, which transformers holds in one array, by a pattern."""
    targets: dict[Scheme, list[str]] = {}
    of_experts = []
    for scheme, named in modules.items():
        targets[scheme] = [name for name in named if not any(re.match(pattern, name) for pattern in patterns)]
        if len(targets[scheme]) < len(named):
            of_experts.append(scheme)
            targets[scheme] += [f"re:{pattern}" for pattern in patterns]
    if len(of_experts) > 1:
        names = " and ".join(format_name(scheme.weights) for scheme in of_experts)
        raise ConfigError(
            f"quantization.rules gives experts the formats {names}, and transformers reads one format for all experts; "
            "use one"
        )
    return targets


def _notes(schemes: Mapping[str, Scheme]) -> tuple[str, ...]:
    notes = []
    for format in sorted({format_name(s.weights) for s in schemes.values() if s.weights.group not in (None, *GROUPS)}):
        notes.append(f"vLLM has kernels for groups of 32, 64 and 128 inputs; transformers reads {format} too.")
    if any(isinstance(s.weights, Ternary) for s in schemes.values()):
        notes.append("Ternary weights are stored as integers of 2 bits, which few programs compute with.")
    return tuple(notes)
