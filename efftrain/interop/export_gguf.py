"""Writes a run's model as a GGUF file, for the architectures that share Llama's names in llama.cpp."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from efftrain.config import difference, to_json
from efftrain.errors import ConfigError, RunError
from efftrain.interop.architecture import FileTensor, layout, same_model
from efftrain.interop.card_facts import card_facts
from efftrain.interop.export_model import file_tensors, planned
from efftrain.interop.gguf_architectures import FIELDS, LAYER, OUTER
from efftrain.interop.gguf_export import ExportTensor, ExportType, write_gguf
from efftrain.interop.gguf_file import interleaved_rows
from efftrain.interop.gguf_tokenizer import GgufTokenizer
from efftrain.interop.gguf_tokenizer_fields import tokenizer_fields
from efftrain.interop.plan import ExportPlan
from efftrain.interop.run_arrays import float_config
from efftrain.interop.run_facts import ZeroCount
from efftrain.interop.settings import Settings
from efftrain.models.decoder import abstract_decoder
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.run.directory import load_model_config, read_json

SAME = {"mistral": "llama"}  # what llama.cpp has one architecture for
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # that are written; more are read, see ``gguf_architectures``
BLOCK = 32  # values that share a scale in the quantised types


def export_gguf(run: Path, out: Path, type: ExportType) -> ExportPlan:
    """Exports the model of a run as a GGUF file; norms, and rows that are no multiple of 32, stay float32.

    Args:
      run: the run directory.
      out: the file, which must not exist.
      type: how matrices are stored.

    Raises:
      ConfigError: the model, or its tokenizer, cannot be expressed in GGUF.
      RunError: the run cannot be read, or the file exists.
    """
    if out.exists():
        raise RunError(f"{out} exists already; choose another --to")
    config = load_model_config(run)
    plan = planned(run, config)
    kind = SAME.get(plan.architecture.model_type, plan.architecture.model_type)
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"{run} is exported as {plan.architecture.name}, and efftrain writes {', '.join(ARCHITECTURES)} as GGUF; "
            "export a folder, and convert it with llama.cpp"
        )
    _check_said(run, plan)
    tensors_of: dict[str, list[FileTensor]] = {}
    for tensor in layout(plan.architecture, plan.config):
        tensors_of.setdefault(tensor.pieces[0].variable, []).append(tensor)
    shapes = {tensor.name: tensor.shape for found in tensors_of.values() for tensor in found}
    fields = {name: plan.settings[field] for name, field in FIELDS.items() if field in plan.settings}
    metadata: dict[str, Any] = {f"{kind}.{name}": value for name, value in fields.items()}
    metadata |= origin_fields(run) | {"general.name": run.name, f"{kind}.vocab_size": config.vocab_size}
    if "head_dim" in plan.settings:
        metadata |= {f"{kind}.rope.dimension_count": plan.settings["head_dim"]}
        metadata |= {f"{kind}.attention.value_length": plan.settings["head_dim"]}
    heads = {}
    if kind == "llama":  # the only architecture whose rows llama.cpp permutes
        heads = {"q_proj": plan.settings["num_attention_heads"], "k_proj": plan.settings["num_key_value_heads"]}
    # The order in which the checkpoint is read: that of the sizes of its variables.
    sizes = {name: array.size for name, array in flatten(nnx.state(abstract_decoder(float_config(config)))).items()}
    variables = sorted(tensors_of, key=lambda variable: (-sizes[variable], variable))
    order = [tensor.name for variable in variables for tensor in tensors_of[variable]]
    zeros = ZeroCount()
    arrays = file_tensors(run, config, plan, zeros)
    tensors = [
        ExportTensor(
            name=_gguf_name(name),
            shape=shapes[name],
            type=type if len(shapes[name]) > 1 and shapes[name][-1] % BLOCK == 0 else "F32",
            read=_reader(arrays, name, heads, last=name == order[-1]),
        )
        for name in order
    ]
    tokenizer = tokenizer_fields(_tokenizer(run), config.vocab_size)
    write_gguf(out, kind, metadata, tokenizer, tensors)
    return replace(plan, notes=plan.notes + zeros.notes)


def origin_fields(run: Path) -> dict[str, Any]:
    """Returns fields of GGUF with the licence, the languages and the name of the imported model that a run was made
    from, as far as the run says so; none for other runs.
    """
    *_, first = card_facts(run).run.chain()
    origin = first.imported or {}
    said = {"general.license": origin.get("license"), "general.languages": origin.get("languages")}
    if origin.get("source"):
        said |= {"general.base_model.count": 1, "general.base_model.0.name": origin.get("name") or origin["source"]}
    return {name: value for name, value in said.items() if value}


def _check_said(run: Path, plan: ExportPlan) -> None:
    """Makes sure that the fields of GGUF say all of the model: read back, they must give its configuration."""
    also = ("vocab_size", "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias")
    said = {name: plan.settings[name] for name in (*FIELDS.values(), *also) if name in plan.settings}
    back = plan.architecture.to_config(Settings(said, "the fields of GGUF"))
    if different := difference(to_json(same_model(back)), to_json(same_model(plan.config))):
        raise ConfigError(
            f"{run} cannot be exported as GGUF, whose fields here do not say {different[0]}; export a folder, and "
            "convert it with llama.cpp"
        )


def _reader(
    arrays: Iterator[tuple[str, np.ndarray]], wanted: str, heads: dict[str, int], *, last: bool
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        name, array = next(arrays)
        assert name == wanted, (name, wanted)
        if last:  # the checks that follow the last array of the checkpoint
            more = next(arrays, None)
            assert more is None, more
        n_heads = heads.get(name.split(".")[-2])
        return array if n_heads is None else interleaved_rows(array, n_heads)

    return read


def _gguf_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    if module in outer:
        return f"{outer[module]}.{leaf}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{ {theirs: ours for ours, theirs in LAYER.items()}[inner] }.{leaf}"


def _tokenizer(run: Path) -> GgufTokenizer:
    if not (run / "tokenizer.json").is_file():
        raise RunError(f"{run} has no tokenizer.json, which a GGUF file needs; copy that of its corpus into the run")
    template, generation = run / "chat_template.jinja", run / "generation_config.json"
    ids = read_json(generation) if generation.is_file() else {}
    flags = json.loads((run / "tokenizer_config.json").read_text()) if (run / "tokenizer_config.json").is_file() else {}
    eos = ids.get("eos_token_id", ())
    return GgufTokenizer(
        tokenizer=Tokenizer.from_file(str(run / "tokenizer.json")),
        bos=ids.get("bos_token_id"),
        eos=tuple(eos) if isinstance(eos, list) else (eos,) if isinstance(eos, int) else (),
        pad=ids.get("pad_token_id"),
        unk=None,
        add_bos=bool(flags.get("add_bos_token", False)),
        add_eos=bool(flags.get("add_eos_token", False)),
        chat_template=template.read_text("utf-8") if template.is_file() else None,
    )
