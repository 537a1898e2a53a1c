"""The loop: it feeds the step, writes metrics one step late, saves, and continues where a run stopped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from efftrain.errors import ConfigError
from efftrain.progress import console
from efftrain.sharding import hosts
from efftrain.sharding.chips import find_chip
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.peers import Peers
from efftrain.sharding.rules import DEFAULT_RULES, ShardingRules, use, without_mesh
from efftrain.train.branch import (
    BranchSchedule,
    branch_from,
    branched,
    continue_data,
    parse_branch,
    show_learning_rates,
)
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.evaluations import Evaluate, Evaluations
from efftrain.train.metrics.metric_sink import MetricSink
from efftrain.train.metrics.metrics_log import keep_lost_rows, read_metrics
from efftrain.train.metrics.profile import Profiler, parse_steps
from efftrain.train.metrics.recorder import Recorder, read_figures
from efftrain.train.metrics.timing import Timing
from efftrain.train.objectives.objective import Objective
from efftrain.train.objectives.teacher import Taught
from efftrain.train.optimizers import AdamW, OptimizerConfig
from efftrain.train.program import Program, Wrap, batch_sharding, make_program
from efftrain.train.run.directory import Run, load
from efftrain.train.schedules import ScheduleConfig, WarmupStableDecay
from efftrain.train.start import start_from, with_warning_of_zeros
from efftrain.train.state import TrainState, merge_model
from efftrain.train.supervision.interruption import Interruption, with_votes
from efftrain.train.supervision.supervise import report_checkpoint
from efftrain.train.supervision.watchdog import Watchdog

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
      ema_decay: keep an exponential moving average of the parameters, and evaluate and load that. The decay grows to
        this with the updates, see ``averages.average_decay``. A run that was begun with a constant decay, as versions
        before had it, goes on with the growing one, by which the initial parameters' part in its average fades. None:
        no average.
      seed: of parameters and randomness; the data have their own.
      max_bad_steps: stop after so many consecutive steps that were not finite; each is skipped and counted.
      eval_every: steps between evaluations. None: only at the end.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: the newest ones that stay.
      keep_every: every checkpoint whose step is a multiple of this stays too. None: only the newest.
      checkpoints: the folder of this run's checkpoints, also on a bucket (gs://bucket/run). None: in the run directory.
      branch: start from a checkpoint of another run, such as runs/dense@480 for step 480: with its optimizer state, at
        its place in the data. None: from the beginning.
      branch_schedule: the learning rate of a branch. "as_configured": that of ``schedule`` at its step, which is smooth
        where the other run was in its stable phase (Haegele et al. 2024). "constant": the last one of the other run,
        until ``schedule`` is below it. "rewarm": all of ``schedule``, warm-up included, over the added steps (Ibrahim
        et al. 2024). None: "as_configured", with a warning where the rate more than doubles.
      finetune: start from the model of another run, such as runs/dense: its parameters alone, averaged ones where it
        keeps them, with a new optimizer state, at the beginning of the data. None: from random parameters.
      mesh: how the devices are used.
      profile: first and last step of a trace, such as 10:15, written to the run directory. None: no trace.
      watchdog: when a run counts as hung.
    """

    steps: int
    batch_size: int
    length: int
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    schedule: ScheduleConfig = field(default_factory=WarmupStableDecay)
    n_microbatches: int = 1
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    seed: int = 0
    max_bad_steps: int = 10
    eval_every: int | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    keep_every: int | None = None
    checkpoints: str | None = None
    branch: str | None = None
    branch_schedule: BranchSchedule | None = None
    finetune: Path | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    profile: str | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)

    def __post_init__(self):
        names = ("steps", "batch_size", "length", "n_microbatches", "max_bad_steps", "checkpoint_every")
        for name in (*names, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        if self.eval_every is not None and self.eval_every < 1:
            raise ConfigError(f"training.eval_every is {self.eval_every}; give at least 1, or None")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.checkpoint_every):
            raise ConfigError(
                f"training.keep_every is {self.keep_every}; give a multiple of checkpoint_every "
                f"{self.checkpoint_every}, or None"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"training.clip_norm is {self.clip_norm}; give a positive number or None")
        if self.batch_size % self.n_microbatches:
            raise ConfigError(
                f"training.batch_size is {self.batch_size}, which n_microbatches {self.n_microbatches} does not divide"
                "; make it a multiple"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"training.ema_decay is {self.ema_decay}; give a number between 0 and 1, or None")
        if self.profile is not None:
            parse_steps(self.profile, self.steps)
        if self.branch is None and self.branch_schedule is not None:
            raise ConfigError("training.branch_schedule has no effect without training.branch; set both, or neither")
        if self.branch is not None:
            parse_branch(self.branch, self.steps)
            if self.finetune is not None:
                raise ConfigError("training.branch and training.finetune are both set; set only one of them")

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
      evaluation: what ``evaluate`` said after the last step; None where there was none.
    """

    model: nnx.Module
    figures: dict[str, float]
    evaluation: dict[str, float] | None


def fit(
    build: Callable[[nnx.Rngs], nnx.Module],
    objective: Objective | Taught,
    batches: Batches,
    config: Training,
    run: Run,
    *,
    wrap: Wrap | None = None,
    initial: Callable[[], nnx.Module] | None = None,
    evaluate: Evaluate | None = None,
    flops_per_token: float | None = None,
    sinks: Sequence[MetricSink] = (),
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
      wrap: put around the optimizer, whose state it shares: what prunes weights (``compress.sparsify``). None: nothing.
      initial: makes the model that a new run starts from, of the structure that ``build`` has; None: as built. Not
        called where a checkpoint is found.
      evaluate: model -> figures on held-out text, written to the metrics. A checkpoint of the same step is saved before
        it. A signal ends an evaluation; the next process makes up for it.
      flops_per_token: model FLOPs of a training token, for MFU.
      sinks: get every row that is written to the metrics, on the first of several processes.
      rules: which mesh axis splits which logical axis.
      devices: that the mesh is made of; by default all.

    Raises:
      RunError: ``max_bad_steps`` steps in a row were not finite; the checkpoint or ``initial`` is of another model.
      SystemExit: with code 75 after SIGTERM or Ctrl-C, when everything is saved. Of several processes, all save the
        same step whichever of them got the signal; where one is lost, the others end (``sharding.peers``).
    """
    for name in ("branch", "finetune"):
        if getattr(config, name) is not None and initial is not None:
            raise ConfigError(f"training.{name} is set and the run starts from a model; set only one of them")
    if config.finetune is not None:
        initial = partial(load, config.finetune)
    if initial is not None and wrap is None:
        initial = with_warning_of_zeros(initial)
    config, mesh = branched(config, run), make_mesh(config.mesh, devices)
    evaluations = Evaluations(evaluate, steps=config.steps, every=config.eval_every, run=run)
    program = make_program(build, objective, config, wrap)
    if hosts.process_count() > 1:
        program = replace(program, step=with_votes(program.step))

    with (
        Peers(),
        use(mesh, rules),
        Interruption() as interruption,
        Checkpoints(run.checkpoints, keep=config.keep_checkpoints, keep_every=config.keep_every) as checkpoints,
    ):
        state = _restore_or_init(program, checkpoints, batches, mesh, rules, initial, config)
        start = int(state.step)
        report_checkpoint(start)
        # Of the step that was restored: a signal or a crash came between its checkpoint and its evaluation.
        owed = start in checkpoints.steps() and evaluations.missing(start)
        if start == config.steps and not owed:
            console.print(f"{run.path} is trained already ({start} steps); nothing to do", markup=False)
            return _fitted(program.graph, state, run)
        if hosts.process_index() == 0:
            keep_lost_rows(run.path, after_step=start, expected=2 * config.checkpoint_every)
        if start < config.steps:
            run.begin(start + 1)
        frozen = program.frozen(mesh, rules)
        timing = Timing(config.batch_size * config.length, flops_per_token, peak_flops(mesh))
        compiled = None
        chosen = config.profile and parse_steps(config.profile, config.steps)
        with (
            Recorder(
                run, timing, start=start, steps=config.steps, max_bad_steps=config.max_bad_steps, sinks=sinks
            ) as recorder,
            config.watchdog.watch(timing, run.path),
            Profiler(chosen, run.path / "profile", recorder, start=start) as profiler,
        ):

            def save(number: int, *, wait: bool) -> None:
                with recorder.phase("checkpoint"):
                    checkpoints.save(number, state, batches.get_state(), run.config)
                    if wait:
                        checkpoints.wait()

            def end(number: int, asked_by: str) -> NoReturn:
                report_checkpoint(number)
                console.print(f"{asked_by}: saved step {number}; the same command continues from there")
                raise SystemExit(EXIT_INTERRUPTED)

            if owed:
                owed = not evaluations.write(start, merge_model(program.graph, state), recorder, interruption)
                if (asked_by := interruption.asked_anywhere()) and (owed or start < config.steps):
                    end(start, asked_by)
            for number in range(start + 1, config.steps + 1):
                profiler.before(number)
                with recorder.phase("input_wait"):
                    batch = place(next(batches), config, mesh, rules) | interruption.vote(mesh)
                if compiled is None:
                    compiled = recorder.compile(program.jit(state), state, batch, frozen)
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, metrics = compiled(state, batch, frozen)
                recorder.push(number, metrics)  # reads the metrics of the step before: no waiting
                profiler.after(number)

                last = number == config.steps
                owed = evaluations.due(number)
                # Read once, as a signal may come between two lines; of several processes what all of them know.
                told = owed or hosts.process_count() == 1
                asked_by = interruption.asked_anywhere() if told else recorder.asked_before(number)
                save_now = last or asked_by or number % config.checkpoint_every == 0
                if owed or save_now:
                    recorder.flush()
                if save_now:
                    save(number, wait=bool(last or asked_by))  # first: an evaluation that fails must not cost the run
                if last:
                    recorder.write_figures()
                if owed and not asked_by:
                    owed = not evaluations.write(number, merge_model(program.graph, state), recorder, interruption)
                    if asked_by := interruption.asked_anywhere():
                        save(number, wait=True)
                if asked_by and (owed or not last):
                    end(number, asked_by)
            if start < config.steps:
                recorder.write_figures()
    return _fitted(program.graph, state, run)


def _fitted(graph: nnx.GraphDef, state: TrainState, run: Run) -> Fitted:
    def kept() -> dict[str, Any]:
        rows = [row for row in read_metrics(run.path, "validation") if row["step"] == int(state.step)]
        return {"figures": read_figures(run), "evaluation": rows[-1] if rows else None}

    return Fitted(model=merge_model(graph, state), **hosts.from_first(kept))


def batch_part(config: Training, rules: ShardingRules = DEFAULT_RULES) -> tuple[int, int]:
    """Which part of each global batch this process feeds: (number, of how many), for ``data.batches``.

    Processes whose devices hold the same rows (a tensor or context axis goes through them) feed the same part.

    Raises:
      ConfigError: the mesh does not fit the devices, or gives this process rows that do not lie together.
    """
    sharding = batch_sharding(config, make_mesh(config.mesh), rules)
    return hosts.part_of_rows(sharding, (config.batch_size, config.length))


def place(
    batch: Mapping[str, np.ndarray], config: Training, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, jax.Array]:
    """This process's rows as parts of global arrays (batch_size, ...), sharded over the mesh."""

    def whole(rows: np.ndarray) -> jax.Array:
        shape = (config.batch_size, *rows.shape[1:])
        sharding = batch_sharding(config, mesh, rules, shape)
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: whole(rows) for name, rows in batch.items()}


def peak_flops(mesh: Mesh) -> float | None:
    """Dense bf16 peak of all devices of a mesh together; None where it is not known."""
    chip = find_chip(mesh.devices.flat[0].device_kind)
    return chip and chip.bf16_flops * mesh.size


def _restore_or_init(
    program: Program,
    checkpoints: Checkpoints,
    batches: Batches,
    mesh: Mesh,
    rules: ShardingRules,
    initial: Callable[[], nnx.Module] | None,
    config: Training,
) -> TrainState:
    abstract = program.abstract_state(mesh, rules)
    found = checkpoints.restore(abstract)
    if found is None and config.branch is None:
        state = jax.jit(program.init, out_shardings=jax.tree.map(lambda array: array.sharding, abstract))()
        if initial is not None:
            with without_mesh():  # it may lie on one device, as ``load`` gives it
                model = initial()
            state = start_from(model, state)
            show_learning_rates(config, 0)
        return state
    if found is None:
        state, data_state = branch_from(config.branch, config.steps, program, abstract)
        continue_data(batches, data_state, parse_branch(config.branch, config.steps)[0])
        show_learning_rates(config, int(state.step - state.skipped))
        return state
    step, state, data_state = found
    console.print(f"continuing from step {step}")
    batches.set_state(data_state)
    return state
