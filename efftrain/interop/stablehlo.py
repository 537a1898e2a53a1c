"""Writes a run's model as a StableHLO program with its weights beside it, which runs with JAX alone."""

import json
from dataclasses import fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, export

from efftrain.errors import ConfigError
from efftrain.interop.card_facts import card_facts
from efftrain.interop.export_model import run_texts
from efftrain.interop.model_card import STABLEHLO, write_card
from efftrain.interop.new_folder import new_folder
from efftrain.interop.run_arrays import abstract_variables
from efftrain.interop.safetensors_writer import SafetensorsWriter
from efftrain.models.config import BlockConfig, ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.models.moe.layer import MoE
from efftrain.progress import Progress
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.flat_state import flatten, unflatten
from efftrain.train.run.directory import checkpoint_directory, load_model_config, read_json

PROGRAM, DESCRIPTION = "forward.stablehlo", "forward.json"
PLATFORMS = ("cpu", "cuda", "tpu")
CODES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
# https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees
COMPATIBILITY = (
    "jax.export promises that a jaxlib reads this program that is up to 6 months newer than jaxlib_version, or up to 3 "
    "weeks older; keep the run, or an export as safetensors, for longer than that"
)


def export_stablehlo(run: Path, out: Path) -> tuple[str, ...]:
    """Exports the forward pass of a run's model, tokens to logits, for CPU, CUDA and TPU.

    The weights are arguments of the program and not constants in it: a serialised program is limited to 2 GB, and other
    weights of the same shapes, such as a fine-tuned run's, can be given to it. They are stored as the checkpoint has
    them, also quantised. Batch and length are symbolic.

    Args:
      run: the run directory.
      out: the folder, which must not exist; it appears when it is complete.

    Returns:
      What the program computes differently from the model, as sentences.

    Raises:
      ConfigError: the work of a layer depends on the length of the rows in another way than a symbolic length can
        express, or the package flatbuffers is missing.
      RunError: the run cannot be read, or the folder cannot be written.
    """
    if find_spec("flatbuffers") is None:
        raise ConfigError("a StableHLO program needs the package flatbuffers; pip install 'efftrain[interop]'")
    config = load_model_config(run)
    program = exported_forward(config)
    notes = tuple(_notes(config))
    abstract = abstract_variables(config)
    facts = card_facts(run)
    with new_folder(out) as folder:
        (folder / PROGRAM).write_bytes(program.serialize())
        (folder / DESCRIPTION).write_text(json.dumps(description(program, config, notes), indent=2) + "\n")
        for name, text in run_texts(run).items():
            (folder / name).write_text(text, encoding="utf-8")
        entries = {name: (CODES[x.dtype.name], np.dtype(x.dtype), x.shape) for name, x in abstract.items()}
        writer = SafetensorsWriter(folder, entries)
        with (
            Progress("export", len(entries), unit="arrays") as progress,
            Checkpoints(checkpoint_directory(run, read_json(run / "config.json")), read_only=True) as checkpoints,
        ):
            for name, array in checkpoints.model_arrays(abstract):
                writer.write(name, np.asarray(array))
                progress.advance()
        writer.close()
        write_card(folder, facts, loading=STABLEHLO, form="StableHLO program", notes=notes)
    return notes


def exported_forward(config: ModelConfig) -> export.Exported:
    """Returns the program ``(weights, tokens (batch, length) int32) -> logits (batch, length, vocab) float32``.

    The weights are a dictionary from the names of a checkpoint to arrays. Both sizes of the tokens are symbolic, with
    ``length`` up to ``max_length``.

    It is traced as for CPU, where no kernel is chosen that only one platform has, and lowered for all of ``PLATFORMS``.

    Args:
      config: configuration of the model.

    Raises:
      ConfigError: see ``export_stablehlo``.
    """
    for number, block in enumerate(config.layers):
        if not block.depth.every_token:
            raise ConfigError(
                f"layer {number} has depth {type(block.depth).__name__}, whose number of tokens follows from the "
                "length of a row: no program takes all lengths; keep the run directory, which efftrain.load opens"
            )
    graph, state = nnx.split(abstract_decoder(_portable(config)))

    def forward(weights: dict[str, Array], tokens_bt: Array) -> Array:
        return nnx.merge(graph, unflatten(weights, state))(tokens_bt)

    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flatten(state).items()}
    batch, length = export.symbolic_shape("batch, length", constraints=[f"length <= {config.max_length}"])
    with jax.default_device("cpu"):
        try:
            return export.export(jax.jit(forward), platforms=PLATFORMS)(
                weights, jax.ShapeDtypeStruct((batch, length), jnp.int32)
            )
        except TypeError as error:  # what a comparison of symbolic sizes raises
            raise ConfigError(
                f"a component of the model needs to know the length of the rows ({str(error).splitlines()[0]}); keep "
                "the run directory, which efftrain.load opens"
            ) from error


def description(program: export.Exported, config: ModelConfig, notes: tuple[str, ...]) -> dict[str, Any]:
    """Returns what a reader of the program must know, as JSON."""
    return {
        "program": PROGRAM,
        "inputs": {
            "weights": "all tensors of the safetensors files, by name",
            "tokens": {"shape": ["batch", "length"], "dtype": "int32", "length": [1, config.max_length]},
        },
        "outputs": {"logits": {"shape": ["batch", "length", config.vocab_size], "dtype": "float32"}},
        "platforms": list(program.platforms),
        "jax_version": jax.__version__,
        "jaxlib_version": version("jaxlib"),
        "calling_convention_version": program.calling_convention_version,
        "compatibility": COMPATIBILITY,
        "notes": list(notes),
    }


def _portable(config: ModelConfig) -> ModelConfig:
    """The same model with the kernels that every platform has and that take rows of a symbolic length."""
    return config.replace(pattern=tuple(_portable_block(block) for block in config.pattern))


def _portable_block(block: BlockConfig) -> BlockConfig:
    own = {field.name for field in fields(block.attention)}
    kernel = {name: value for name, value in (("backend", "xla"), ("n_blocks", 1)) if name in own}
    mlp = replace(block.mlp, dispatch="reference", saliency=False) if isinstance(block.mlp, MoE) else block.mlp
    return replace(block, attention=replace(block.attention, **kernel), mlp=mlp)


def _notes(config: ModelConfig) -> list[str]:
    experts = [block.mlp for block in config.layers if isinstance(block.mlp, MoE)]
    notes = []
    if experts:
        notes.append(
            "All experts compute every token, which takes the results of its own ones: the work of all experts."
        )
    if any(mlp.dispatch == "capacity" for mlp in experts):
        notes.append("Experts take every token that is routed to them, also those that moe.dispatch 'capacity' drops.")
    return notes
