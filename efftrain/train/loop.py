"""The loop: it feeds the step, writes metrics one step late, saves, and continues where a run stopped."""

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efftrain.errors import ConfigError, RunError
from efftrain.progress import console
from efftrain.sharding import hosts
from efftrain.sharding.chips import find_chip
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.peers import Peers
from efftrain.sharding.rules import DEFAULT_RULES, ShardingRules, use
from efftrain.train.branch import branch_from, parse_branch
from efftrain.train.checkpoints import Checkpoints
from efftrain.train.interruption import Interruption
from efftrain.train.objective import Metrics, Objective
from efftrain.train.optimizers import AdamW, Muon
from efftrain.train.profile import Profiler, parse_steps
from efftrain.train.program import Program, Wrap, batch_sharding, make_program
from efftrain.train.recorder import VOTES, Recorder, read_figures
from efftrain.train.run import Run, read_metrics
from efftrain.train.schedules import Cosine, WarmupStableDecay
from efftrain.train.state import TrainState, merge_model, split_model
from efftrain.train.step import Step
from efftrain.train.supervise import report_checkpoint
from efftrain.train.teacher import Taught
from efftrain.train.timing import Timing
from efftrain.train.watchdog import Watchdog

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
      mesh: how the devices are used.
      profile: first and last step of a trace, such as 10:15, written to the run directory. None: no trace.
      watchdog: when a run counts as hung.
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
    keep_every: int | None = None
    checkpoints: str | None = None
    branch: str | None = None
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
        if self.branch is not None:
            parse_branch(self.branch, self.steps)

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
    objective: Objective | Taught,
    batches: Batches,
    config: Training,
    run: Run,
    *,
    wrap: Wrap | None = None,
    initial: Callable[[], nnx.Module] | None = None,
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
      wrap: put around the optimizer, whose state it shares: what prunes weights (``compress.sparsify``). None: nothing.
      initial: makes the model that a new run starts from, of the structure that ``build`` has; None: as built. Not
        called where a checkpoint is found.
      evaluate: model -> figures on held-out text, written to the metrics.
      flops_per_token: model FLOPs of a training token, for MFU.
      rules: which mesh axis splits which logical axis.
      devices: that the mesh is made of; by default all.

    Raises:
      RunError: ``max_bad_steps`` steps in a row were not finite; the checkpoint or ``initial`` is of another model.
      SystemExit: with code 75 after SIGTERM or Ctrl-C, when everything is saved. Of several processes, all save the
        same step whichever of them got the signal; where one is lost, the others end (``sharding.peers``).
    """
    if config.branch is not None and initial is not None:
        raise ConfigError("training.branch is set and the run starts from a model; leave one of them out")
    mesh = make_mesh(config.mesh, devices)
    program = make_program(build, objective, config, wrap)
    if hosts.process_count() > 1:
        program = replace(program, step=_with_votes(program.step))

    with (
        Peers(),
        use(mesh, rules),
        Interruption() as interruption,
        Checkpoints(run.checkpoints, keep=config.keep_checkpoints, keep_every=config.keep_every) as checkpoints,
    ):
        state = _restore_or_init(program, checkpoints, batches, mesh, rules, initial, config)
        start = int(state.step)
        report_checkpoint(start)
        if start == config.steps:
            console.print(f"{run.path} is trained already ({start} steps); nothing to do", markup=False)
            return _fitted(program.graph, state, run)
        frozen = program.frozen(mesh, rules)
        timing = Timing(config.batch_size * config.length, flops_per_token, peak_flops(mesh))
        compiled = None
        chosen = config.profile and parse_steps(config.profile, config.steps)
        with (
            Recorder(run, timing, start=start, steps=config.steps, max_bad_steps=config.max_bad_steps) as recorder,
            config.watchdog.watch(timing, run.path),
            Profiler(chosen, run.path / "profile", recorder, start=start) as profiler,
        ):
            for number in range(start + 1, config.steps + 1):
                profiler.before(number)
                with recorder.phase("input_wait"):
                    batch = place(next(batches), config, mesh, rules) | _vote(interruption, mesh)
                if compiled is None:
                    compiled = recorder.compile(program.jit(state), state, batch, frozen)
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, metrics = compiled(state, batch, frozen)
                recorder.push(number, metrics)  # reads the metrics of the step before: no waiting
                profiler.after(number)

                last = number == config.steps
                # Read once, as a signal may come between two lines; of several processes what all of them know.
                asked_by = interruption.asked if hosts.process_count() == 1 else recorder.asked_before(number)
                evaluate_now = evaluate and (last or (config.eval_every and number % config.eval_every == 0))
                save_now = last or asked_by or number % config.checkpoint_every == 0
                if evaluate_now or save_now:
                    recorder.flush()
                if evaluate_now:
                    with recorder.phase("evaluation"):
                        evaluation = evaluate(merge_model(program.graph, state))
                    recorder.write_evaluation(number, evaluation)
                if save_now:
                    with recorder.phase("checkpoint"):
                        checkpoints.save(number, state, batches.get_state(), run.config)
                        if last or asked_by:
                            checkpoints.wait()
                if asked_by and not last:
                    report_checkpoint(number)
                    console.print(f"{asked_by}: saved step {number}; the same command continues from there")
                    raise SystemExit(EXIT_INTERRUPTED)
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


def _vote(interruption: Interruption, mesh: Mesh) -> dict[str, jax.Array]:
    """Whether a signal asked this process to stop, as a part of the batch: so all of them learn it at the same step."""
    if hosts.process_count() == 1:
        return {}
    asked_by = interruption.asked  # read once: a signal may come between two looks
    vote = hosts.process_index() * 256 + signal.Signals[asked_by] if asked_by else -1
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    votes = np.full(len(mesh.local_devices), vote, np.int32)
    return {VOTES: jax.make_array_from_process_local_data(sharding, votes, (mesh.size,))}


def _with_votes(step: Step) -> Step:
    def voting(
        state: TrainState, batch: Mapping[str, jax.Array], frozen: nnx.State | None = None
    ) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, {name: rows for name, rows in batch.items() if name != VOTES}, frozen)
        return state, metrics | {VOTES: (jnp.max(batch[VOTES]), 1)}

    return voting


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
        return state if initial is None else start_from(initial(), state)
    if found is None:
        state, data_state = branch_from(config.branch, config.steps, program, abstract)
    else:
        step, state, data_state = found
        console.print(f"continuing from step {step}")
    batches.set_state(data_state)
    return state


def start_from(model: nnx.Module, state: TrainState) -> TrainState:
    """A new state with the variables of a model."""
    _, params, model_state = split_model(model)
    if "helpers" in state.params:  # what an objective has trained beside the model starts as built
        params = nnx.merge_state(params, nnx.State({"helpers": state.params["helpers"]}))

    def place(new: nnx.State, old: nnx.State) -> nnx.State:
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (new, old)]
        if shapes[0] != shapes[1]:
            raise RunError("the initial model has other variables than the one to be trained; build both alike")
        # Not the caller's own arrays: the step donates its state.
        return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding, may_alias=False), new, old)

    params = place(params, state.params)
    ema = state.ema and jax.tree.map(jnp.copy, params)
    return replace(state, params=params, model_state=place(model_state, state.model_state), ema=ema)
