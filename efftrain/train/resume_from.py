"""Starts a run from a checkpoint of another run, with its optimizer state and position in the data.

Variants that only concern the end of a run (quantisation while the learning rate decays, another schedule, more steps)
can start from one common run and are compared from the same state on. Both learning rates are shown.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from efftrain.errors import RunError
from efftrain.models.quantization import RATIO
from efftrain.progress import console
from efftrain.sharding import hosts
from efftrain.train.batches import Batches
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.flat_state import flatten, unflatten
from efftrain.train.config import Training, parse_resume_from
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.program import Program
from efftrain.train.run.directory import Run, checkpoint_directory, newest_step, read_json
from efftrain.train.run.identity import steps_made
from efftrain.train.schedules import Capped, Rewarmed
from efftrain.train.state import TrainState

FILE_NAME = "branch.json"  # in a run: what it must know of the other run, which may be gone when the run is continued
JUMP = 2.0  # a learning rate that rises by a larger factor causes a warning, unless a schedule was chosen
AT_PEAK = 0.99  # share of a run's largest learning rate above which it is still in its stable phase

WRAPPED, PLAIN = "opt_state/inner/", "opt_state/"  # prefixes: state of a wrapped optimizer, and of one on its own
# Parts of the names of variables that the other run need not have: they start as built.
COUNT, FRESH, KEPT = "opt_state/count", "opt_state/fresh", "opt_state/kept/"
HELPERS = "/helpers/"  # variables that an objective trains beside the model
NEW = (RATIO, "opt_state/masks/", KEPT, FRESH, COUNT, HELPERS)


def resumed_state(text: str, steps: int, program: Program, abstract: TrainState) -> tuple[TrainState, Any]:
    """Returns the state at a checkpoint of another run, and its position in the data.

    Args:
      text: value of ``Training.resume_from``.
      steps: number of steps of the new run.
      program: functions of the new run; they create the variables that the other run does not have.
      abstract: state of the new run as shapes with shardings.

    Raises:
      RunError: there is no such run or checkpoint, or it belongs to another model or optimizer.
    """
    run, step = parse_resume_from(text, steps)
    if not (run / "config.json").exists():
        raise RunError(f"training.resume_from: {run} holds no run; train it first, or give another one")
    with Checkpoints(checkpoint_directory(run, read_json(run / "config.json")), read_only=True) as checkpoints:
        if step not in checkpoints.steps():
            raise RunError(
                f"training.resume_from: {run} has checkpoints of steps "
                f"{', '.join(map(str, checkpoints.steps())) or 'none'} and not of {step}; give one of them, or train "
                "it with --training.keep-every"
            )
        arrays, data_state = checkpoints.restore_step(step, abstract, new=NEW, instead=(WRAPPED, PLAIN))
    missing = {name: array.sharding for name, array in flatten(abstract).items() if name not in arrays}
    if missing:  # only these are created, because two whole states may not fit into memory
        arrays |= jax.jit(lambda: {n: flatten(program.init())[n] for n in missing}, out_shardings=missing)()
    if COUNT in missing:  # the new optimizer wraps the old one, which made this number of updates
        arrays[COUNT] = jax.device_put(arrays["step"] - arrays["skipped"], missing[COUNT])
    if any(name.startswith(KEPT) for name in missing):  # the kept values are taken from the parameters
        arrays[FRESH] = jax.device_put(jnp.ones((), bool), arrays[FRESH].sharding)
    console.print(f"resuming from step {step} of {run}", markup=False)
    return unflatten(arrays, abstract), data_state


def with_resume_schedule(config: Training, run: Run) -> Training:
    """Returns the configuration with the learning rate schedule that ``training.resume_schedule`` selects.

    The configuration of a run without ``training.resume_from`` is returned unchanged.

    Raises:
      RunError: the schedule is "constant" and the metrics of the other run do not have its learning rate.
    """
    if config.resume_from is None or config.resume_schedule in (None, "as_configured"):
        return config
    source, step = parse_resume_from(config.resume_from, config.steps)
    if config.resume_schedule == "rewarm":
        return replace(config, schedule=Rewarmed(schedule=config.schedule, begin=step))
    rate = hosts.from_first(lambda: _kept_rate(run, source, step))
    return replace(config, schedule=Capped(schedule=config.schedule, factor=rate / config.optimizer.peak_lr))


def continue_data(batches: Batches, position: Any, source: Path) -> None:
    """Sets the batches to the position that the other run had in its data.

    Raises:
      RunError: the other run read other data.
    """
    try:
        batches.set_state(position)
    except RunError as error:
        raise RunError(
            f"training.resume_from: {source} read other data (another corpus, mixture, seed, length or batch size); "
            "give the same ones, or start from its model alone with training.finetune"
        ) from error


def show_learning_rates(config: Training, updates: int) -> None:
    """Prints the learning rate at a run's first step and, if known, at the end of the run from which it starts.

    Warns if it more than doubles and ``training.resume_schedule`` was not chosen.

    Args:
      config: configuration as ``with_resume_schedule`` returns it.
      updates: number of updates that the optimizer has made.
    """
    after = _learning_rate(config, updates)
    if config.finetune is not None:
        run = config.finetune
        before = hosts.from_first(lambda: rates(run).get(newest_step(run, read_json(run / "config.json"))))
        console.print(
            f"learning rate: {_shown(before)} at the last step of {run}; here {_shown(after)} at step 1, at most "
            f"{_shown(config.optimizer.peak_lr)}",
            markup=False,
        )
        return
    if config.resume_from is None:
        peak = config.optimizer.peak_lr
        console.print(f"learning rate: {_shown(after)} at step 1, at most {_shown(peak)}", markup=False)
        return
    run, step = parse_resume_from(config.resume_from, config.steps)
    found = dict(hosts.from_first(lambda: [[n, rate] for n, rate in rates(run).items() if n <= step]))
    before = found.get(step)
    console.print(
        f"learning rate: {_shown(before)} at step {step} of {run}, {_shown(after)} at step {step + 1} here",
        markup=False,
    )
    if before is not None and after > JUMP * before and config.resume_schedule is None:
        peak = max(n for n, rate in found.items() if rate >= AT_PEAK * max(found.values()))
        console.print(
            f"warning: the learning rate rises from {_shown(before)} to {_shown(after)}; resume from the stable phase "
            f"(its peak lasted until step {peak}), or set training.resume_schedule: constant stays at {_shown(before)} "
            "until the schedule is below it, rewarm goes through the schedule again, as_configured rises at once",
            style="yellow",
            markup=False,
        )


def rates(run: Path) -> dict[int, float]:
    """Returns step -> learning rate, for the steps in a run's metrics."""
    if not (run / "metrics.jsonl").exists():
        return {}
    return {row["step"]: row["lr"] for row in read_metrics(run) if row.get("lr") is not None}


def _kept_rate(run: Run, source: Path, step: int) -> float:
    """The learning rate of the other run at a step; a run that has begun reads its own note, as that may be gone."""
    kept = run.path / FILE_NAME
    if kept.exists() and steps_made(run.path, run.checkpoints, run.config) != "none":
        return read_json(kept)["learning_rate"]
    rate = rates(source).get(step)
    if rate is None:
        raise RunError(
            f"training.resume_schedule is constant and {source / 'metrics.jsonl'} has no learning rate of step {step}; "
            "choose as_configured or rewarm"
        )
    run.write_json(FILE_NAME, {"run": str(source), "step": step, "learning_rate": rate})
    return rate


def _learning_rate(config: Training, updates: int) -> float:
    """Learning rate of the update that follows ``updates`` earlier ones."""
    rate = config.optimizer.peak_lr * config.schedule.build(config.steps)(updates)
    return float(rate)  # ty: ignore[invalid-argument-type]  # optax types it as any number, also a complex one


def _shown(rate: float | None) -> str:
    return "not known" if rate is None else f"{rate:.3g}"
