"""A GGUF file as a source of an import: its names and fields in those of transformers, its tokenizer as files."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.errors import ConfigError, ModelFileError
from efftrain.interop.gguf_file import GgufFile, llama_rows
from efftrain.interop.gguf_tokenizer import read_tokenizer
from efftrain.interop.settings import Settings

# Name in llama.cpp -> name in transformers, of the architectures that share Llama's names.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Field in llama.cpp, after the name of the architecture -> field in transformers.
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Fields that repeat others, or change nothing here.
_REPEATED = ("rope.dimension_count", "attention.value_length", "vocab_size", "rope.scaling.finetuned")


class GgufModel:
    """A ``source.ModelSource`` of a GGUF file of the architectures llama, qwen2 and qwen3.

    Args:
      path: the file.

    Raises:
      ConfigError: the architecture or a field is unknown, or the package gguf is missing.
      ModelFileError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path, self._file = path, GgufFile.open(path)
        architecture = self._file.architecture
        if architecture not in ARCHITECTURES:
            raise ConfigError(
                f"{path}: general.architecture is {architecture!r}; efftrain reads {', '.join(ARCHITECTURES)} from "
                "GGUF, and other architectures from the folder in the format of Hugging Face"
            )
        self._names = dict(self._named())
        tensors = self._file.tensors
        self.shapes: Mapping[str, tuple[int, ...]] = {n: tuple(tensors[t].shape) for n, t in self._names.items()}
        self.settings = Settings(self._fields(architecture), str(path))
        self.texts: Mapping[str, str] = self._texts()
        types = Counter(tensor.type for tensor in self._file.tensors.values())
        license = self._file.metadata.get("general.license")
        self.origin: Mapping[str, Any] = {"format": "gguf", "dtypes": dict(types), "license": license}

    def read(self, name: str) -> np.ndarray:
        array = self._file.read(self._names[name])
        if self._file.architecture == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
            return llama_rows(array, self.settings.count("num_attention_heads"))
        if self._file.architecture == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
            return llama_rows(array, self.settings.count("num_key_value_heads"))
        return array

    def _named(self) -> Any:
        for name in self._file.tensors:
            module, _, leaf = name.rpartition(".")
            if module in OUTER:
                yield f"{OUTER[module]}.{leaf}", name
                continue
            _, layer, inner = [*module.split(".", 2), "", ""][:3]
            if not module.startswith("blk.") or inner not in LAYER:
                raise ConfigError(
                    f"{self.path} holds the tensor {name}, which efftrain does not know; import the folder of the "
                    "original model instead"
                )
            yield f"model.layers.{layer}.{LAYER[inner]}.{leaf}", name

    def _fields(self, architecture: str) -> dict[str, Any]:
        metadata = self._file.metadata
        prefix = f"{architecture}."
        own = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
        fields = {FIELDS.get(name, name): _shortest(value) for name, value in own.items() if name not in _REPEATED}
        kind = fields.pop("rope.scaling.type", "none")
        if kind not in ("none", ""):
            raise ConfigError(f"{self.path}: rope.scaling.type is {kind!r}; import the folder of the original model")
        size = own.get("rope.dimension_count")
        heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
        if size is not None and heads and width and size != fields.get("head_dim", width // heads):
            raise ConfigError(
                f"{self.path}: rope.dimension_count is {size}, a part of a head; import the original model"
            )
        table = self._file.tensors.get("token_embd.weight")
        if table is None:
            raise ModelFileError(f"{self.path} has no tensor token_embd.weight; convert the model again with llama.cpp")
        biased = any(name.endswith("attn_q.bias") for name in self._file.tensors)
        return fields | {
            "model_type": architecture,
            "vocab_size": table.shape[0],
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "attention_bias": biased and architecture != "qwen2",
        }

    def _texts(self) -> dict[str, str]:
        found = read_tokenizer(self.path, self._file.metadata)
        ids = {"bos_token_id": found.bos, "eos_token_id": list(found.eos) or None, "pad_token_id": found.pad}
        generation = {name: value for name, value in ids.items() if value is not None}
        texts = {
            "tokenizer.json": found.tokenizer.to_str(pretty=True),
            "generation_config.json": json.dumps(generation, indent=2) + "\n",
            "tokenizer_config.json": json.dumps(_tokenizer_config(found), indent=2, ensure_ascii=False) + "\n",
        }
        if found.chat_template is not None:
            texts["chat_template.jinja"] = found.chat_template
        return texts


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
