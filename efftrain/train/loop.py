"""The loop: it feeds the step, writes metrics one step late, saves, and continues where a run stopped."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from efftrain.errors import ConfigError
from efftrain.progress import console
from efftrain.sharding.chips import find_chip
from efftrain.sharding.layout import state_shardings, with_shardings
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import DEFAULT_RULES, ShardingRules, use
from efftrain.train.checkpoints import Checkpoints
from efftrain.train.interruption import Interruption
from efftrain.train.objective import Objective
from efftrain.train.optimizers import AdamW, Muon, with_clipping
from efftrain.train.recorder import Recorder, read_figures
from efftrain.train.run import Run, read_metrics
from efftrain.train.schedules import Cosine, WarmupStableDecay
from efftrain.train.state import TrainState, init_state, merge_model, split_model
from efftrain.train.step import make_step
from efftrain.train.timing import Timing

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: everything is saved, the same command continues


class Batches(Protocol):
    """Endless batches of this process, dicts of NumPy arrays, with a position that can be saved as JSON."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained.

    Attributes:
      steps: how many.
      batch_size: rows of a step, over all devices.
      length: tokens of a row.
      optimizer: and its peak learning rate.
      schedule: of the learning rate.
      n_microbatches: a step's rows are taken in so many parts; saves memory, and time where memory is slow.
      clip_norm: largest global gradient norm. None: no clip.
      ema_decay: keep averaged parameters, and evaluate and load those. None: do not.
      seed: of parameters and randomness; the data have their own.
      max_bad_steps: stop after so many consecutive steps that were not finite; each is skipped and counted.
      eval_every: steps between evaluations. None: only at the end.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: the newest ones that stay.
      mesh: how the devices are used.
    """

    steps: int
    batch_size: int
    length: int
    optimizer: AdamW | Muon = field(default_factory=AdamW)
    schedule: WarmupStableDecay | Cosine = field(default_factory=WarmupStableDecay)
    n_microbatches: int = 1
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    seed: int = 0
    max_bad_steps: int = 10
    eval_every: int | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        names = ("steps", "batch_size", "length", "n_microbatches", "max_bad_steps", "checkpoint_every")
        for name in (*names, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        if self.eval_every is not None and self.eval_every < 1:
            raise ConfigError(f"training.eval_every is {self.eval_every}; give at least 1, or None")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"training.clip_norm is {self.clip_norm}; give a positive number or None")
        if self.batch_size % self.n_microbatches:
            raise ConfigError(
                f"training.batch_size is {self.batch_size}, which n_microbatches {self.n_microbatches} does not divide"
                "; make it a multiple"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"training.ema_decay is {self.ema_decay}; give a number between 0 and 1, or None")

    @property
    def tokens(self) -> int:
        """Tokens that the whole run reads."""
        return self.steps * self.batch_size * self.length


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What ``fit`` returns.

    Attributes:
      model: trained; with the averaged parameters where the run keeps them.
      figures: the run's times, units in their names.
      evaluation: what ``evaluate`` said behind the last step; None where there was none.
    """

    model: nnx.Module
    figures: dict[str, float]
    evaluation: dict[str, float] | None


def fit(
    build: Callable[[nnx.Rngs], nnx.Module],
    objective: Objective,
    batches: Batches,
    config: Training,
    run: Run,
    *,
    evaluate: Callable[[nnx.Module], dict[str, float]] | None = None,
    flops_per_token: float | None = None,
    rules: ShardingRules = DEFAULT_RULES,
    devices: Sequence[jax.Device] | None = None,
) -> Fitted:
    """Trains a model, or continues the run that the directory holds.

    Args:
      build: makes the module; called under jit, so that parameters are born sharded.
      objective: what is minimised.
      batches: this process's part of every global batch.
      config: see ``Training``.
      run: the directory.
      evaluate: model -> figures on held-out text, written to the metrics.
      flops_per_token: model FLOPs of a training token, for MFU.
      rules: which mesh axis splits which logical axis.
      devices: that the mesh is made of; by default all.

    Raises:
      RunError: ``max_bad_steps`` steps in a row were not finite, or the checkpoint is of another model.
      SystemExit: with code 75 after SIGTERM or Ctrl-C, when everything is saved.
    """
    mesh = make_mesh(config.mesh, devices)
    factor = config.schedule.build(config.steps)
    optimizer = with_clipping(config.optimizer.build(factor), config.clip_norm)
    graph = split_model(nnx.eval_shape(lambda: build(nnx.Rngs(0))))[0]
    step = make_step(
        graph,
        objective,
        optimizer,
        n_microbatches=config.n_microbatches,
        ema_decay=config.ema_decay,
        learning_rate=lambda step: config.optimizer.peak_lr * factor(step),
    )

    def init() -> TrainState:
        return init_state(build, optimizer, seed=config.seed, ema=config.ema_decay is not None)

    with (
        use(mesh, rules),
        Interruption() as interruption,
        Checkpoints(run.path / "checkpoints", keep=config.keep_checkpoints) as checkpoints,
    ):
        state = _restore_or_init(init, checkpoints, batches, mesh, rules)
        start = int(state.step)
        if start == config.steps:
            console.print(f"{run.path} is trained already ({start} steps); nothing to do", markup=False)
            return _fitted(graph, state, run)
        timing = Timing(config.batch_size * config.length, flops_per_token, peak_flops(mesh))
        compiled = None
        with Recorder(run, timing, start=start, steps=config.steps, max_bad_steps=config.max_bad_steps) as recorder:
            for number in range(start + 1, config.steps + 1):
                asked = time.perf_counter()
                batch = place(next(batches), config, mesh, rules)
                wait_s = time.perf_counter() - asked
                if compiled is None:
                    recorder.progress.note("compiling")
                    same = jax.tree.map(lambda array: array.sharding, state)  # or XLA may choose another for the result
                    program = jax.jit(step, donate_argnums=0, out_shardings=(same, None))
                    compiled = program.lower(state, batch).compile()
                    recorder.compiled(compiled, time.perf_counter() - asked)
                state, metrics = compiled(state, batch)
                recorder.push(number, metrics, wait_s)  # reads the metrics of the step before: no waiting

                last, asked_by = number == config.steps, interruption.asked  # a signal may come between two lines
                evaluate_now = evaluate and (last or (config.eval_every and number % config.eval_every == 0))
                save_now = last or asked_by or number % config.checkpoint_every == 0
                if evaluate_now or save_now:
                    recorder.flush()
                if evaluate_now:
                    recorder.write_evaluation(number, evaluate(merge_model(graph, state)))
                if save_now:
                    checkpoints.save(number, state, batches.get_state(), run.config)
                if asked_by and not last:
                    checkpoints.wait()
                    console.print(f"{asked_by}: saved step {number}; the same command continues from there")
                    raise SystemExit(EXIT_INTERRUPTED)
            recorder.write_figures()
    return _fitted(graph, state, run)


def _fitted(graph: nnx.GraphDef, state: TrainState, run: Run) -> Fitted:
    last = [row for row in read_metrics(run.path, "validation") if row["step"] == int(state.step)]
    return Fitted(model=merge_model(graph, state), figures=read_figures(run), evaluation=last[-1] if last else None)


def place(
    batch: Mapping[str, np.ndarray], config: Training, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, jax.Array]:
    """This process's rows as parts of global arrays (batch_size, length), sharded over the mesh."""
    shape = (config.batch_size, config.length)
    spec = rules.resolve(("batch", "length"), shape, mesh, name="training (batch_size, length)")
    sharding = NamedSharding(mesh, spec)
    return {name: jax.make_array_from_process_local_data(sharding, rows, shape) for name, rows in batch.items()}


def peak_flops(mesh: Mesh) -> float | None:
    """Dense bf16 peak of all devices of a mesh together; None where it is not known."""
    chip = find_chip(mesh.devices.flat[0].device_kind)
    return chip and chip.bf16_flops * mesh.size


def _restore_or_init(
    init: Callable[[], TrainState],
    checkpoints: Checkpoints,
    batches: Batches,
    mesh: Mesh,
    rules: ShardingRules,
) -> TrainState:
    abstract = jax.eval_shape(init)
    shardings = state_shardings(abstract, mesh, rules)
    found = checkpoints.restore(with_shardings(abstract, shardings))
    if found is None:
        return jax.jit(init, out_shardings=shardings)()
    step, state, data_state = found
    batches.set_state(data_state)
    console.print(f"continuing from step {step}")
    return state
