"""A GGUF file as a source of an import: its names and fields in those of transformers, its tokenizer as files."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.errors import ConfigError, ModelFileError
from efftrain.interop.architecture import EXPERT
from efftrain.interop.gguf_architectures import ARCHITECTURES, LLAMA_EXPERTS
from efftrain.interop.gguf_file import GgufFile, llama_rows
from efftrain.interop.gguf_rope import ROPE_TENSORS, rope_scaling
from efftrain.interop.gguf_tokenizer import read_tokenizer
from efftrain.interop.settings import Settings

# Fields that repeat others, or change nothing here.
_REPEATED = ("attention.value_length", "vocab_size", "rope.scaling.finetuned")


class GgufModel:
    """A ``source.ModelSource`` of a GGUF file of one of the architectures in ``gguf_architectures``.

    Args:
      path: the file.

    Raises:
      ConfigError: the architecture or a field is unknown, or the package gguf is missing.
      ModelFileError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path, self._file = path, GgufFile.open(path)
        name = self._file.architecture
        if name not in ARCHITECTURES:
            raise ConfigError(
                f"{path}: general.architecture is {name!r}; efftrain reads {', '.join(ARCHITECTURES)} from GGUF, and "
                "other architectures from the folder in the format of Hugging Face"
            )
        with_experts = name == "llama" and self._file.metadata.get("llama.expert_count")
        self._architecture = LLAMA_EXPERTS if with_experts else ARCHITECTURES[name]
        tensors = self._file.tensors
        self._places = {place.name: place for place in self._named()}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: self._shape(tensors[place.tensor].shape, place) for name, place in self._places.items()
        }
        self.settings = Settings(self._fields(name), str(path))
        self.texts: Mapping[str, str] = self._texts()
        types = Counter(tensor.type for tensor in self._file.tensors.values())
        general = {name: self._file.metadata.get(f"general.{name}") for name in ("name", "organization", "languages")}
        said = {name: value for name, value in general.items() if value}
        license = self._file.metadata.get("general.license")
        self.origin: Mapping[str, Any] = {"format": "gguf", "dtypes": dict(types), "license": license} | said

    def read(self, name: str) -> np.ndarray:
        place, how = self._places[name], self._architecture
        array = self._file.read(place.tensor, place.expert)
        module = place.tensor.split(".")[-2]
        if how.interleaved and module in ("attn_q", "attn_k"):
            heads = "num_attention_heads" if module == "attn_q" else "num_key_value_heads"
            return llama_rows(array, self.settings.count(heads, self.settings.count("num_attention_heads")))
        if how.norm_shift and name.endswith("norm.weight"):
            return array.astype(np.float32) - np.float32(how.norm_shift)
        return array.T if self._is_transposed(array.shape, place) else array

    def _named(self) -> Iterator["_Place"]:
        how = self._architecture
        for tensor, found in self._file.tensors.items():
            module, _, leaf = tensor.rpartition(".")
            if tensor in ROPE_TENSORS:
                continue
            if module in how.outer:
                yield _Place(f"{how.outer[module]}.{leaf}", tensor)
                continue
            _, layer, inner = [*module.split(".", 2), "", ""][:3]
            if not module.startswith("blk.") or inner not in how.names:
                raise ConfigError(
                    f"{self.path} holds the tensor {tensor}, which efftrain does not know; import the folder of the "
                    "original model instead"
                )
            name = f"{how.layer}{layer}.{how.names[inner]}.{leaf}"
            if EXPERT not in name:
                yield _Place(name, tensor)
                continue
            if len(found.shape) != 3:
                raise ModelFileError(
                    f"{self.path}: {tensor} has the shape {tuple(found.shape)}; convert the model again, so "
                    "that it has a matrix for each expert"
                )
            for expert in range(found.shape[0]):
                yield _Place(name.format(expert=expert), tensor, expert)

    def _shape(self, shape: tuple[int, ...], place: "_Place") -> tuple[int, ...]:
        shape = tuple(shape if place.expert is None else shape[1:])
        return shape[::-1] if self._is_transposed(shape, place) else shape

    def _is_transposed(self, shape: tuple[int, ...], place: "_Place") -> bool:
        return self._architecture.transposed and len(shape) == 2 and place.tensor.startswith("blk.")

    def _fields(self, architecture: str) -> dict[str, Any]:
        how, tensors, prefix = self._architecture, self._file.tensors, f"{architecture}."
        own = {
            name.removeprefix(prefix): _shortest(value)
            for name, value in self._file.metadata.items()
            if name.startswith(prefix) and name.removeprefix(prefix) not in _REPEATED
        }
        scaling = rope_scaling(self._file, own)
        found = {how.fields.get(name, name): value for name, value in own.items()}
        if "token_embd.weight" not in tensors:
            raise ModelFileError(f"{self.path} has no tensor token_embd.weight; convert the model again with llama.cpp")
        said: dict[str, Any] = dict(how.fixed) | found
        try:
            more = how.more(said)
        except KeyError as error:
            field = next((ours for ours, theirs in how.fields.items() if theirs == error.args[0]), error.args[0])
            raise ModelFileError(f"{self.path} has no field {prefix}{field}; convert the model again") from error
        said |= dict(more) | scaling
        if said.get("sliding_window") == 0:  # no windows
            del said["sliding_window"]
        if any(name.endswith("attn_q.bias") for name in tensors) and how.model_type != "qwen2":
            said["attention_bias"] = True
        if any(name.endswith("ffn_gate.bias") for name in tensors):
            said["mlp_bias"] = True
        return said | {
            "model_type": how.model_type,
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in tensors,
        }

    def _texts(self) -> dict[str, str]:
        found = read_tokenizer(self.path, self._file.metadata)
        ids = {"bos_token_id": found.bos, "eos_token_id": list(found.eos) or None, "pad_token_id": found.pad}
        generation = {name: value for name, value in ids.items() if value is not None}
        texts = {
            "tokenizer.json": found.with_added_tokens().to_str(pretty=True),
            "generation_config.json": json.dumps(generation, indent=2) + "\n",
            "tokenizer_config.json": json.dumps(_tokenizer_config(found), indent=2, ensure_ascii=False) + "\n",
        }
        if found.chat_template is not None:
            texts["chat_template.jinja"] = found.chat_template
        return texts


@dataclass(frozen=True)
class _Place:
    """Where the file has a tensor of transformers: in a tensor, or as one slice of a tensor of all experts."""

    name: str
    tensor: str
    expert: int | None = None


def _shortest(value: Any) -> Any:
    """The shortest number that is the same in float32, in which GGUF holds 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _tokenizer_config(found: Any) -> dict[str, Any]:
    """What transformers needs beside a tokenizer.json."""
    token = found.tokenizer.id_to_token
    names = {"bos_token": found.bos, "eos_token": found.eos[0] if found.eos else None, "pad_token": found.pad}
    config: dict[str, Any] = {name: token(number) for name, number in names.items() if number is not None}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": found.add_bos}
    return config | {"add_eos_token": found.add_eos, "clean_up_tokenization_spaces": False}
