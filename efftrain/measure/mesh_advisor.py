"""Search for the mesh on which to train a model: all shapes are estimated by formulas, and the best few compiled."""

import math

from flax import nnx

from efftrain.errors import ConfigError
from efftrain.measure.compiled.aot import CompiledStep, Target, compile_target
from efftrain.measure.cost.mesh_estimate import Estimate, estimate
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import use
from efftrain.sharding.topologies import Topology
from efftrain.train.program import abstract_batch, make_program


def search(target: Target, topology: Topology, *, n_compiled: int = 2) -> tuple[list[Estimate], list[CompiledStep]]:
    """Ranks the mesh shapes of a slice by their estimated step time, and compiles the best few.

    Args:
      target: what is trained; its own mesh only gives the size of the expert axis.
      topology: the slice.
      n_compiled: number of mesh shapes that are compiled.

    Returns:
      The estimates of the mesh shapes that fit the memory by the formulas, fastest first; and the reports of the
      compiled ones, first those that fit, fastest first.

    Raises:
      ConfigError: no mesh shape divides this model and batch, or none fits the memory.
    """
    training = target.training
    model = nnx.eval_shape(lambda: target.build(nnx.Rngs(0)))
    program = make_program(target.build, target.objective, training, target.wrap)
    teacher = None if program.teacher is None else program.teacher.abstract_model()
    found, refused = [], ""
    for config in mesh_shapes(len(topology.devices), expert=training.mesh.expert):
        try:
            mesh = make_mesh(config, topology.devices)
            with use(mesh):
                state = program.abstract_state(mesh)
                abstract_batch(training, mesh)
                frozen = program.abstract_frozen(mesh)
            found.append(estimate(model, training, state, mesh, topology, teacher=teacher, frozen=frozen))
        except ConfigError as error:
            refused = refused or str(error)
    if not found:
        raise ConfigError(f"{target.name} cannot be split over any mesh of {len(topology.devices)} devices ({refused})")
    fitting = [e for e in found if e.memory_bytes <= (topology.chip.hbm_bytes if topology.chip else math.inf)]
    if not fitting:
        least = min(found, key=lambda e: e.memory_bytes)
        raise ConfigError(
            f"{target.name} does not fit {topology.name} on any mesh: the smallest needs about "
            f"{least.memory_bytes / 1e9:.1f} GB per device; use remat, more micro-batches or a larger slice"
        )
    ranked = sorted(fitting, key=lambda e: (e.times.step_s, e.times.ici_s, e.memory_bytes))
    reports = [compile_target(target.with_mesh(MeshConfig(**e.mesh)), topology) for e in ranked[:n_compiled]]
    return ranked, sorted(reports, key=lambda r: (r.memory.fits is False, r.times.step_s if r.times else 0.0))


def mesh_shapes(n_devices: int, *, expert: int = 1) -> list[MeshConfig]:
    """All ways to divide devices between the axes replica, fsdp, tensor and context, for a given expert axis."""
    left = n_devices // expert if n_devices % expert == 0 else 0
    return [
        MeshConfig(
            replica=replica, fsdp=left // (replica * tensor * context), expert=expert, tensor=tensor, context=context
        )
        for tensor in _divisors(left)
        for context in _divisors(left // tensor)
        for replica in _divisors(left // (tensor * context))
    ]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
