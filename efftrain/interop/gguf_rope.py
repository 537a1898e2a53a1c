"""Scaled rotary positions of GGUF files, as the ``rope_scaling`` of transformers."""

import math
from typing import Any

from efftrain.errors import ConfigError
from efftrain.interop.gguf_file import GgufFile

# Tensors that no layer owns: divisors of the rotary frequencies (Llama 3.1; LongRoPE).
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQUENCIES, LONG, SHORT)
_SCALING = "rope.scaling."


def rope_scaling(file: GgufFile, own: dict[str, Any]) -> dict[str, Any]:
    """Reads the scaling and the extent of rotary positions.

    Args:
      file: the file.
      own: the fields of the architecture, by their names after that of the architecture; those that are read here are
        removed.

    Returns:
      Fields of transformers.

    Raises:
      ConfigError: the file has a scaling that efftrain does not know.
    """
    found = {name: own.pop(name) for name in list(own) if name.startswith(_SCALING)}
    fields = {name.removeprefix(_SCALING): value for name, value in found.items()}
    length = fields.pop("original_context_length", own.get("context_length"))
    kind, factor = fields.pop("type", "none"), fields.pop("factor", None)
    attention = fields.pop("attn_factor", 1.0)
    tensors = [name for name in ROPE_TENSORS if name in file.tensors]
    scaling: dict[str, Any] | None = None
    if tensors == [FREQUENCIES] and kind in ("none", ""):
        factors = file.read(FREQUENCIES).astype(float).tolist()
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0}
    elif tensors == [LONG, SHORT] and kind in ("none", "", "longrope"):
        long, short = (file.read(name).astype(float).tolist() for name in tensors)
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention}
        attention = 1.0
    elif tensors:
        raise ConfigError(
            f"{file.path}: {_SCALING}type is {kind!r} beside {', '.join(tensors)}; import the folder of the original "
            "model"
        )
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        for name in ("beta_fast", "beta_slow"):
            if (value := fields.pop(f"yarn_{name}", None)) is not None:
                scaling[name] = value
    elif kind not in ("none", ""):
        raise ConfigError(f"{file.path}: {_SCALING}type is {kind!r}; import the folder of the original model")
    if attention != 1:
        fields["attn_factor"] = attention
    if fields:
        name, value = next(iter(fields.items()))
        raise ConfigError(
            f"{file.path}: {_SCALING}{name} is {value!r}, which has no place here; import the folder of the original "
            "model"
        )
    if scaling is not None and scaling["rope_type"] != "linear":
        scaling["original_max_position_embeddings"] = length
    return ({} if scaling is None else {"rope_scaling": scaling}) | _rotated(file, own)


def _rotated(file: GgufFile, own: dict[str, Any]) -> dict[str, Any]:
    """The share of a head that is rotated, if it is not all of it."""
    size = own.pop("rope.dimension_count", None)
    heads, width = own.get("attention.head_count"), own.get("embedding_length")
    if size is None or not heads or not width:
        return {}
    d_head = own.get("attention.key_length", width // heads)
    if not 0 < size <= d_head:
        raise ConfigError(f"{file.path}: rope.dimension_count is {size}, and a head has {d_head} channels")
    share = size / d_head
    if int(share * d_head) < size:  # a rounding error
        share = math.nextafter(share, 1)
    return {} if size == d_head else {"partial_rotary_factor": share}
