"""Compiles a recipe's training step ahead of time for chips that are not present, and reports memory and step time."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from efftrain.errors import ConfigError
from efftrain.measure.compiled.aot_traffic import Traffic, traffic
from efftrain.measure.compiled.aot_warnings import loop_warnings, parameter_warnings
from efftrain.measure.compiled.hlo import ProgramText
from efftrain.measure.cost.flops import FORWARD_AND_BACKWARD, attention_flops, mean_visible_keys, training_flops
from efftrain.measure.cost.mesh_estimate import estimate
from efftrain.models.config import BlockConfig
from efftrain.models.decoder import Decoder
from efftrain.recipe import MODEL_OF, import_script
from efftrain.sharding.layout import layout
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.roofline import Roofline, axis_bandwidth, roofline
from efftrain.sharding.rules import use
from efftrain.sharding.topologies import Topology
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective
from efftrain.train.program import Wrap, abstract_batch, make_program


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled: the training step of a configuration of a recipe.

    Attributes:
      name: name of the recipe and the configuration, for reports.
      build, objective, wrap: as for ``fit``.
      training: the training configuration, with the mesh.
    """

    name: str
    build: Callable[[nnx.Rngs], Decoder]
    objective: Objective
    training: Training
    wrap: Wrap | None = None

    def with_mesh(self, mesh: MeshConfig) -> "Target":
        return dataclasses.replace(self, training=dataclasses.replace(self.training, mesh=mesh))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a training step in bytes on each device.

    Attributes:
      parameters, optimizer, other_state: the parts of the train state.
      teacher: variables of the teacher; 0 without one.
      batch: the batch.
      total: all memory that the step needs, with the program itself.
      limit: memory of the chip; None if it is not known.
    """

    parameters: int
    optimizer: int
    other_state: int
    teacher: int
    batch: int
    temporaries: int
    """Activations, gradients and gathered parameters: all that the step allocates in addition to its arguments."""
    total: int
    limit: float | None

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None else self.total <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """The report of a compiled training step; all figures are of one device and one step.

    Attributes:
      target: name of the target.
      topology: name of the topology.
      devices: number of devices.
      mesh: size of each mesh axis.
      memory: memory of the step.
      flops: FLOPs that the program computes; only products count.
      model_flops: FLOPs that the mathematics needs (see ``measure.cost.flops``).
      hbm_bytes: bytes that are moved to and from memory.
      counted_from: "program", or "formulas" if the text of the program is not available.
      times: lower bounds of the time by the roofline model; None for a chip whose peaks are not known.
      collectives: traffic between devices; empty if the text of the program is not available.
      warnings: problems of the layout, as sentences.
      compile_s: time of compilation in seconds.
    """

    target: str
    topology: str
    devices: int
    mesh: dict[str, int]
    memory: Memory
    flops: float
    model_flops: float
    hbm_bytes: float
    counted_from: str
    times: Roofline | None
    collectives: list[Traffic]
    warnings: list[str]
    compile_s: float

    def as_json(self) -> dict[str, Any]:
        """The report as JSON, with the derived values of ``memory`` and ``times``."""
        found = dataclasses.asdict(self)
        found["memory"]["fits"] = self.memory.fits
        if self.times:
            found["times"] |= {"step_s": self.times.step_s, "dominant": self.times.dominant}
        return found


def read_target(recipe: Path, name: str | None = None, *, model_of: Path | None = None) -> Target:
    """Reads a configuration of a recipe script.

    Args:
      recipe: path of the script.
      name: name of the configuration. None: the first one.
      model_of: run whose model takes the place of the configuration's. None: the model of the configuration.

    Raises:
      ConfigError: the script has no ``configs``, no ``program``, or no such configuration.
    """
    script = import_script(recipe)
    configs, program = getattr(script, "configs", None), getattr(script, "program", None)
    if not configs:
        raise ConfigError(f"{recipe} has no table `configs`; give a recipe, such as recipes/dense.py")
    if program is None:
        raise ConfigError(f"{recipe} has no function `program(config) -> (build, objective[, wrap])`; add one")
    name = next(iter(configs)) if name is None else name
    if name not in configs:
        raise ConfigError(f"{recipe} has no configuration {name!r}; choose one of {', '.join(configs)}")
    config, title = configs[name], f"{Path(recipe).stem} {name}"
    if model_of is not None:
        if not hasattr(config, "for_flags"):
            raise ConfigError(f"the configurations of {recipe} are no Experiment, which --model-of needs; remove it")
        config, title = config.for_flags({MODEL_OF: str(model_of)}), f"{title} with the model of {model_of}"
    build, objective, *wrap = program(config)
    return Target(title, build, objective, config.training, *wrap)


def compile_target(target: Target, topology: Topology) -> CompiledStep:
    """Compiles the training step that ``fit`` would run on a slice, without running it or allocating its arrays.

    Compilation takes seconds to minutes.

    Args:
      target: what is compiled.
      topology: the slice.

    Raises:
      ConfigError: the mesh does not fit the topology, or a parameter cannot be sharded on the mesh.
    """
    training = target.training
    mesh = make_mesh(training.mesh, topology.devices)
    program = make_program(target.build, target.objective, training, target.wrap)
    with use(mesh):
        state, batch = program.abstract_state(mesh), abstract_batch(training, mesh)
        frozen = program.abstract_frozen(mesh)
        began = time.perf_counter()
        compiled = program.jit(state).lower(state, batch, frozen).compile()
        compile_s = time.perf_counter() - began
    memory = _memory(compiled.memory_analysis(), state, batch, frozen, topology)
    model = nnx.eval_shape(lambda: target.build(nnx.Rngs(0)))
    teacher = None if program.teacher is None else program.teacher.abstract_model()
    formulas = estimate(model, training, state, mesh, topology, teacher=teacher, frozen=frozen)
    text, warnings = _read(compiled)
    if not memory.fits and memory.limit:
        warnings.append(f"does not fit: {memory.total / 1e9:.1f} GB of {memory.limit / 1e9:.0f} GB on each device")
    warnings += parameter_warnings(layout(state.params, mesh), mesh, tiled=topology.chip is not None)
    flops, hbm_bytes, collectives = formulas.flops, formulas.hbm_bytes, []
    if text is not None:
        collectives = traffic(text, mesh)
        flops, hbm_bytes = text.flops + _kernel_flops(text, model, teacher, training, mesh, warnings), text.memory_bytes
        warnings += loop_warnings(text, collectives, (state.params, frozen))
    times = None
    if topology.chip is not None:
        ici_s = formulas.times.ici_s if text is None else _ici_seconds(text, mesh, topology)
        times = roofline(topology.chip, flops=flops, hbm_bytes=hbm_bytes, ici_s=ici_s)
    return CompiledStep(
        target=target.name,
        topology=topology.name,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        memory=memory,
        flops=flops,
        model_flops=_flops(model, teacher, training) * training.batch_size * training.length / mesh.size,
        hbm_bytes=hbm_bytes,
        counted_from="formulas" if text is None else "program",
        times=times,
        collectives=collectives,
        warnings=warnings,
        compile_s=compile_s,
    )


def _read(compiled: Any) -> tuple[ProgramText | None, list[str]]:
    """The program's text, or None with a warning, because libtpu cannot print every program."""
    try:
        return ProgramText(compiled.as_text()), []
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        return None, [f"the text of the program is not available ({reason}); FLOPs, bytes and times come from formulas"]


def _flops(model: Decoder, teacher: Decoder | None, training: Training) -> float:
    """Model FLOPs per token, with the forward pass of the teacher."""
    alone = training_flops(model, training.length)
    return alone if teacher is None else alone + training_flops(teacher, training.length) / FORWARD_AND_BACKWARD


def _kernel_flops(
    text: ProgramText,
    model: Decoder,
    teacher: Decoder | None,
    training: Training,
    mesh: Mesh,
    warnings: list[str],
) -> float:
    unknown, flops = text.kernels
    if not unknown:
        return flops
    warnings.append(f"{unknown} kernel calls state no FLOPs; the FLOPs of attention are added by formula")
    passes = FORWARD_AND_BACKWARD + (model.config.remat == "full")
    tokens = training.batch_size * training.length / mesh.size
    layers = [(layer, passes) for layer in model.config.layers]
    layers += [(layer, 1) for layer in teacher.config.layers] if teacher is not None else []

    def attention(layer: BlockConfig) -> float:
        window = getattr(layer.attention, "window", None)
        return attention_flops(layer.attention, mean_visible_keys(training.length, window))

    return flops + tokens * sum(n * attention(layer) for layer, n in layers)


def _memory(analysis: Any, state: Any, batch: Any, frozen: Any, topology: Topology) -> Memory:
    parameters, optimizer = _device_bytes(state.params), _device_bytes(state.opt_state)
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        other_state=_device_bytes(state) - parameters - optimizer,
        teacher=_device_bytes(frozen),
        batch=_device_bytes(batch),
        temporaries=temporaries,
        total=arguments + max(outputs, 0) + temporaries + analysis.generated_code_size_in_bytes,
        limit=None if topology.chip is None else topology.chip.hbm_bytes,
    )


def _device_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _ici_seconds(text: ProgramText, mesh: Mesh, topology: Topology) -> float:
    return sum(row.sent / axis_bandwidth(topology, mesh, row.axes) for row in traffic(text, mesh) if row.axes)
