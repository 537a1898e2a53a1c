"""What efftrain must know of a foreign architecture: its names, its transpositions and its configuration fields."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from efftrain.errors import ConfigError
from efftrain.interop.settings import Settings
from efftrain.models.config import BlockConfig, ModelConfig
from efftrain.models.decoder import StepCount, abstract_decoder
from efftrain.models.moe.layer import BalanceBias, MoE, StarvedSteps
from efftrain.train.checkpoints.flat_state import flatten

LEAVES = {"kernel": "weight", "table": "weight", "scale": "weight", "bias": "bias"}
EXPERT = "{expert}"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A foreign architecture as a table.

    Attributes:
      name: class of transformers, such as ``LlamaForCausalLM``.
      model_type: ``model_type`` in a ``config.json``.
      to_config: reads the configuration.
      outer: module outside of the layers -> module in the files.
      layer: start of the names of a layer's modules in the files, with ``{layer}``.
      names: module in a layer -> module in the files. Modules with the same name are concatenated there along their
        outputs, in the order of the table. A name with ``{expert}`` has a module for each expert.
      transposed: matrices are (d_out, d_in) in the files.
      no_parameters: ends of names of tensors that the files may hold and that are not parameters.
    """

    name: str
    model_type: str
    to_config: Callable[[Settings], ModelConfig]
    outer: Mapping[str, str]
    layer: str
    names: Mapping[str, str]
    transposed: bool = True
    no_parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of one of efftrain's variables, which may be stacked over layers and experts.

    Attributes:
      variable: its name in a checkpoint, such as ``blocks/0/mlp/up/kernel``.
      index: indices of its leading axes.
      shape: shape of the part.
    """

    variable: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file, and the pieces of variables that it holds, concatenated along their last axis.

    Attributes:
      name: its name in the file.
      pieces: what it holds.
      transposed: it is stored as (last axis, other axis).
    """

    name: str
    pieces: tuple[Piece, ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        *before, _ = self.pieces[0].shape
        shape = (*before, sum(piece.shape[-1] for piece in self.pieces))
        return shape[::-1] if self.transposed else shape


def layout(architecture: Architecture, config: ModelConfig) -> list[FileTensor]:
    """Lists the tensors of a model's files, in the order of efftrain's variables.

    Raises:
      ConfigError: the architecture has no name for a variable of the model.
    """
    found: dict[str, list[Piece]] = {}
    transposed: dict[str, bool] = {}
    for variable, array in _trained(config):
        matrix = not variable.endswith(("/scale", "/bias", "/table"))
        for name, piece in _pieces(architecture, config, variable, array.shape):
            found.setdefault(name, []).append(piece)
            transposed[name] = architecture.transposed and matrix
    order = {module: number for number, module in enumerate(architecture.names)}
    for pieces in found.values():
        pieces.sort(key=lambda piece: order.get(_inner(piece.variable)[0], 0))
    return [FileTensor(name, tuple(pieces), transposed[name]) for name, pieces in found.items()]


def not_in_files(config: ModelConfig) -> dict[str, Any]:
    """Returns the abstract variables of a model that no file holds, which start at zero: those that are not trained."""
    trained = {name for name, _ in _trained(config)}
    return {name: array for name, array in flatten(nnx.state(abstract_decoder(config))).items() if name not in trained}


def _trained(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    model = abstract_decoder(config)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, BalanceBias | StarvedSteps | StepCount):
            yield "/".join(map(str, path)), variable.get_value()


def _inner(variable: str) -> tuple[str, str]:
    """Module and leaf of a variable, without the ``blocks/N/`` of a layer."""
    if variable.startswith("blocks/"):
        variable = variable.split("/", 2)[2]
    module, _, leaf = variable.rpartition("/")
    return (module, leaf) if leaf in LEAVES else (variable, "kernel")


def _pieces(
    architecture: Architecture, config: ModelConfig, variable: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, Piece]]:
    module, leaf = _inner(variable)
    if not variable.startswith("blocks/"):
        yield _name(architecture, architecture.outer, module, leaf), Piece(variable, (), shape)
        return
    position = int(variable.split("/")[1])
    name = architecture.layer + _name(architecture, architecture.names, module, leaf)
    for repeat in range(shape[0]):
        layer = repeat * len(config.pattern) + position
        if EXPERT not in name:
            yield name.format(layer=layer), Piece(variable, (repeat,), shape[1:])
            continue
        for expert in range(shape[1]):
            yield name.format(layer=layer, expert=expert), Piece(variable, (repeat, expert), shape[2:])


def _name(architecture: Architecture, names: Mapping[str, str], module: str, leaf: str) -> str:
    if module not in names:
        raise ConfigError(f"{architecture.name} has no place for {module}; export to an architecture that has one")
    return f"{names[module]}.{LEAVES[leaf]}"


def repeated(layers: Sequence[BlockConfig]) -> dict[str, Any]:
    """Returns ``pattern`` and ``n_repeats`` of a stack: its shortest period."""
    n = len(layers)
    period = next(p for p in range(1, n + 1) if n % p == 0 and list(layers) == list(layers[:p]) * (n // p))
    return {"pattern": tuple(layers[:period]), "n_repeats": n // period}


def same_model(config: ModelConfig) -> ModelConfig:
    """Returns the configuration without the fields that only say how a model is computed or trained."""
    plain = ModelConfig.__dataclass_fields__
    config = config.replace(**{name: plain[name].default for name in ("scan", "remat", "layer_dropout", "dtype")})
    layers = []
    for block in config.layers:
        kernel = {"n_blocks", "backend"} & {f.name for f in dataclasses.fields(block.attention)}
        neutral = {name: type(block.attention).__dataclass_fields__[name].default for name in kernel}
        mlp = block.mlp
        if isinstance(mlp, MoE):
            shape = {
                name: getattr(mlp, name) for name in ("n_experts", "top_k", "d_expert", "n_shared", "scores", "router")
            }
            mlp = MoE(**shape, renormalize=mlp.gates_sum_to_one)
        attention = dataclasses.replace(block.attention, **neutral)
        layers.append(dataclasses.replace(block, attention=attention, mlp=mlp))
    return config.replace(**repeated(layers))
