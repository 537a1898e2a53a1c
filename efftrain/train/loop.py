"""The training loop: it runs the steps, writes metrics, saves checkpoints and continues an interrupted run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from efftrain.errors import ConfigError
from efftrain.models.decoder import Decoder
from efftrain.progress import console
from efftrain.sharding import hosts
from efftrain.sharding.chips import find_chip
from efftrain.sharding.mesh import make_mesh
from efftrain.sharding.peers import Peers
from efftrain.sharding.rules import DEFAULT_RULES, ShardingRules, use
from efftrain.train.batches import Batches, place
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.config import Training
from efftrain.train.evaluations import Evaluate, Evaluations
from efftrain.train.metrics.metric_logger import MetricLogger, read_figures
from efftrain.train.metrics.metric_sink import MetricSink
from efftrain.train.metrics.metrics_log import keep_lost_rows, read_metrics
from efftrain.train.metrics.profile import Profiler
from efftrain.train.metrics.timing import Timing
from efftrain.train.objectives.objective import Objective
from efftrain.train.objectives.teacher import TeacherObjective
from efftrain.train.program import Wrap, make_program
from efftrain.train.resume_from import with_resume_schedule
from efftrain.train.run.directory import Run, load
from efftrain.train.saver import Saver
from efftrain.train.start import restore_or_start, with_warning_of_zeros
from efftrain.train.state import TrainState, merge_model
from efftrain.train.supervision.interruption import Interruption, with_votes
from efftrain.train.supervision.supervise import report_checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of ``fit``.

    Attributes:
      model: the trained model; with the averaged parameters if the run keeps them.
      figures: times of the run; each name contains its unit.
      evaluation: result of ``evaluate`` after the last step. None: there was no evaluation.
    """

    model: Decoder
    figures: dict[str, float]
    evaluation: dict[str, float] | None


def fit(
    build: Callable[[nnx.Rngs], Decoder],
    objective: Objective | TeacherObjective,
    batches: Batches,
    config: Training,
    run: Run,
    *,
    wrap: Wrap | None = None,
    initial: Callable[[], Decoder] | None = None,
    evaluate: Evaluate | None = None,
    flops_per_token: float | None = None,
    sinks: Sequence[MetricSink] = (),
    rules: ShardingRules = DEFAULT_RULES,
    devices: Sequence[jax.Device] | None = None,
) -> TrainResult:
    """Trains a model, or continues the run in the run directory.

    Args:
      build: function that builds the model; called under jit, so that parameters are created sharded.
      objective: the loss function to minimise.
      batches: this process's part of every global batch.
      config: see ``Training``.
      run: the run directory.
      wrap: function that wraps the optimizer in another transformation, such as one that prunes weights
        (``compress.pruning.sparsify``). None: the optimizer as configured.
      initial: function that returns the model from which a new run starts; its structure must be that of ``build``.
        Not called if there is a checkpoint. None: start from the parameters that ``build`` creates.
      evaluate: function from the model to figures on held-out text, which are written to the metrics. A checkpoint of
        the same step is saved before it. A signal ends an evaluation; the next process repeats it. None: no evaluation.
      flops_per_token: model FLOPs of one training token, for MFU. None: MFU is not reported.
      sinks: receive every row that is written to the metrics, on the first process only.
      rules: which mesh axis splits which logical axis.
      devices: the devices of the mesh. None: all devices.

    Returns:
      The trained model, the times of the run and its last evaluation.

    Raises:
      RunError: ``max_bad_steps`` consecutive steps were not finite, or the checkpoint or ``initial`` belongs to another
        model.
      SystemExit: with code 75 after SIGTERM or Ctrl-C, once everything is saved. With several processes, all save the
        same step, whichever of them got the signal; if one process is lost, the others end (``sharding.peers``).
    """
    initial = _initial(config, initial, wrap)
    config, mesh = with_resume_schedule(config, run), make_mesh(config.mesh, devices)
    program = make_program(build, objective, config, wrap)
    program = replace(program, step=with_votes(program.step))
    evaluations = Evaluations(evaluate, steps=config.steps, every=config.eval_every, run=run)
    with (
        Peers(),
        use(mesh, rules),
        Interruption() as interruption,
        Checkpoints(run.checkpoints, keep=config.keep_checkpoints, keep_every=config.keep_every) as checkpoints,
    ):
        state = restore_or_start(program, checkpoints, batches, mesh, rules, initial, config)
        start = int(state.step)
        report_checkpoint(start)
        # A signal or a crash may have come between the checkpoint of the restored step and its evaluation.
        due = start in checkpoints.steps() and evaluations.missing(start)
        if start == config.steps and not due:
            console.print(f"{run.path} is trained already ({start} steps); nothing to do", markup=False)
            return _result(program.graph, state, run)
        _begin(run, config, start)
        frozen, compiled = program.frozen(mesh, rules), None
        timing = Timing(config.batch_size * config.length, flops_per_token, peak_flops(mesh))
        with (
            MetricLogger(
                run, timing, start=start, steps=config.steps, max_bad_steps=config.max_bad_steps, sinks=sinks
            ) as logger,
            config.watchdog.watch(timing, run.path),
            Profiler(config.profiled_steps, run.path / "profile", logger, start=start) as profiler,
        ):
            saver = Saver(checkpoints, batches, run, logger)
            if due:
                due = not evaluations.run(start, merge_model(program.graph, state), logger, interruption)
                if (asked_by := interruption.asked_anywhere()) and (due or start < config.steps):
                    saver.save_and_exit(start, state, asked_by)

            for number in range(start + 1, config.steps + 1):
                profiler.before(number)
                with logger.phase("input_wait"):
                    batch = place(next(batches), config, mesh, rules) | interruption.vote(mesh)
                if compiled is None:
                    compiled = logger.compile(program.jit(state), state, batch, frozen)
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, metrics = compiled(state, batch, frozen)
                logger.push(number, metrics)  # reads the metrics of the previous step, which does not wait
                profiler.after(number)

                last, due = number == config.steps, evaluations.due(number)
                asked_by = interruption.asked_by(number, logger, together=due)
                if last or asked_by or number % config.checkpoint_every == 0:  # first: an evaluation may fail
                    saver.save(number, state, wait=bool(last or asked_by))
                if last:
                    logger.write_figures()
                if due and not asked_by:
                    due = not evaluations.run(number, merge_model(program.graph, state), logger, interruption)
                    asked_by = interruption.asked_anywhere()
                if asked_by and (due or not last):  # otherwise the run is complete
                    saver.save_and_exit(number, state, asked_by)
            if start < config.steps:
                logger.write_figures()
    return _result(program.graph, state, run)


def _initial(
    config: Training, initial: Callable[[], Decoder] | None, wrap: Wrap | None
) -> Callable[[], Decoder] | None:
    """Returns the function that returns the model from which a new run starts, also for ``training.finetune``."""
    for name in ("resume_from", "finetune"):
        if getattr(config, name) is not None and initial is not None:
            raise ConfigError(f"training.{name} is set and the run starts from a model; set only one of them")
    if config.finetune is not None:
        initial = partial(load, config.finetune)
    return with_warning_of_zeros(initial) if initial is not None and wrap is None else initial


def _begin(run: Run, config: Training, start: int) -> None:
    """Prepares the run directory for the steps after ``start``."""
    if hosts.process_index() == 0:
        keep_lost_rows(run.path, after_step=start, expected=2 * config.checkpoint_every)
    if start < config.steps:
        run.begin(start + 1)


def _result(graph: nnx.GraphDef, state: TrainState, run: Run) -> TrainResult:
    def kept() -> dict[str, Any]:
        rows = [row for row in read_metrics(run.path, "validation") if row["step"] == int(state.step)]
        return {"figures": read_figures(run), "evaluation": rows[-1] if rows else None}

    return TrainResult(model=merge_model(graph, state), **hosts.from_first(kept))


def peak_flops(mesh: Mesh) -> float | None:
    """Dense bf16 peak of all devices of a mesh together, in FLOPs per second. None: the device is not known."""
    chip = find_chip(mesh.devices.flat[0].device_kind)
    return None if chip is None else chip.bf16_flops * mesh.size
