"""A run that goes on from a checkpoint of another one: its parameters, optimizer state and position in the data.

What only concerns the end of a run (quantisation while the learning rate decays, another schedule, more steps) is tried
on top of one trunk, and compared with it from the same state on. The learning rate before and after is shown.
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
from efftrain.train.checkpoints.checkpoints import Checkpoints, flatten, unflatten
from efftrain.train.config import Training, parse_branch
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.program import Program
from efftrain.train.run.directory import Run, checkpoint_directory, newest_step, read_json
from efftrain.train.run.identity import steps_made
from efftrain.train.schedules import Capped, Rewarmed
from efftrain.train.state import TrainState

FILE_NAME = "branch.json"  # in a run, what it must know of its trunk, which may be gone when it goes on
JUMP = 2.0  # a learning rate that rises by more is warned of, where nobody chose it
AT_PEAK = 0.99  # of the largest rate of a run: still in its stable phase

WRAPPED, PLAIN = "opt_state/inner/", "opt_state/"  # the state of an optimizer within another's, and of one alone
# In the names of what a trunk need not have: it starts as built.
COUNT, FRESH, KEPT = "opt_state/count", "opt_state/fresh", "opt_state/kept/"
HELPERS = "/helpers/"  # what an objective trains beside the model
NEW = (RATIO, "opt_state/masks/", KEPT, FRESH, COUNT, HELPERS)


def branch_from(text: str, steps: int, program: Program, abstract: TrainState) -> tuple[TrainState, Any]:
    """The state at a checkpoint of another run, and the position in its data.

    Args:
      text: ``Training.branch``.
      steps: of the new run.
      program: of the new run, which makes what the other run does not have.
      abstract: its state, with shardings.

    Raises:
      RunError: there is no such run or checkpoint, or it is of another model or optimizer.
    """
    run, step = parse_branch(text, steps)
    if not (run / "config.json").exists():
        raise RunError(f"training.branch: {run} holds no run; train it first, or give another one")
    with Checkpoints(checkpoint_directory(run, read_json(run / "config.json")), read_only=True) as checkpoints:
        if step not in checkpoints.steps():
            raise RunError(
                f"training.branch: {run} has checkpoints of steps {', '.join(map(str, checkpoints.steps())) or 'none'} "
                f"and not of {step}; give one of them, or train it with --training.keep-every"
            )
        arrays, data_state = checkpoints.restore_step(step, abstract, new=NEW, instead=(WRAPPED, PLAIN))
    missing = {name: array.sharding for name, array in flatten(abstract).items() if name not in arrays}
    if missing:  # only these are made: two whole states may not fit
        arrays |= jax.jit(lambda: {n: flatten(program.init())[n] for n in missing}, out_shardings=missing)()
    if COUNT in missing:  # an optimizer around the one that made so many updates
        arrays[COUNT] = jax.device_put(arrays["step"] - arrays["skipped"], missing[COUNT])
    if any(name.startswith(KEPT) for name in missing):  # what is kept is taken from the parameters
        arrays[FRESH] = jax.device_put(jnp.ones((), bool), arrays[FRESH].sharding)
    console.print(f"branching from step {step} of {run}", markup=False)
    return unflatten(arrays, abstract), data_state


def branched(config: Training, run: Run) -> Training:
    """With the schedule that ``training.branch_schedule`` makes of that of a branch; other runs stay as they are.

    Raises:
      RunError: the rate shall stay at that of the trunk, whose metrics do not have it.
    """
    if config.branch is None or config.branch_schedule in (None, "as_configured"):
        return config
    trunk, step = parse_branch(config.branch, config.steps)
    if config.branch_schedule == "rewarm":
        return replace(config, schedule=Rewarmed(schedule=config.schedule, begin=step))
    rate = hosts.from_first(lambda: _kept_rate(run, trunk, step))
    return replace(config, schedule=Capped(schedule=config.schedule, factor=rate / config.optimizer.peak_lr))


def continue_data(batches: Batches, position: Any, trunk: Path) -> None:
    """Sets the data to the position in a trunk's.

    Raises:
      RunError: the trunk read other data.
    """
    try:
        batches.set_state(position)
    except RunError as error:
        raise RunError(
            f"training.branch: {trunk} read other data (another corpus, mixture, seed, length or batch size); give the "
            "same ones, or start from its model alone with training.finetune"
        ) from error


def show_learning_rates(config: Training, updates: int) -> None:
    """Prints the learning rate at a run's first step and, where it is known, at the end of what it starts from.

    Warns where a branch more than doubles it and ``training.branch_schedule`` was not chosen.

    Args:
      config: as ``branched`` gives it.
      updates: that the optimizer has made.
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
    if config.branch is None:
        peak = config.optimizer.peak_lr
        console.print(f"learning rate: {_shown(after)} at step 1, at most {_shown(peak)}", markup=False)
        return
    run, step = parse_branch(config.branch, config.steps)
    found = dict(hosts.from_first(lambda: [[n, rate] for n, rate in rates(run).items() if n <= step]))
    before = found.get(step)
    console.print(
        f"learning rate: {_shown(before)} at step {step} of {run}, {_shown(after)} at step {step + 1} here",
        markup=False,
    )
    if before is not None and after > JUMP * before and config.branch_schedule is None:
        peak = max(n for n, rate in found.items() if rate >= AT_PEAK * max(found.values()))
        console.print(
            f"warning: the learning rate rises from {_shown(before)} to {_shown(after)}; branch from the stable phase "
            f"(its peak lasted until step {peak}), or set training.branch_schedule: constant stays at {_shown(before)} "
            "until the schedule is below it, rewarm goes through the schedule again, as_configured rises at once",
            style="yellow",
            markup=False,
        )


def rates(run: Path) -> dict[int, float]:
    """Step -> the learning rate of that step, of those in a run's metrics."""
    if not (run / "metrics.jsonl").exists():
        return {}
    return {row["step"]: row["lr"] for row in read_metrics(run) if row.get("lr") is not None}


def _kept_rate(run: Run, trunk: Path, step: int) -> float:
    """The trunk's rate at a step; known to a run that has begun, when its trunk may be gone."""
    kept = run.path / FILE_NAME
    if kept.exists() and steps_made(run.path, run.checkpoints, run.config) != "none":
        return read_json(kept)["learning_rate"]
    rate = rates(trunk).get(step)
    if rate is None:
        raise RunError(
            f"training.branch_schedule is constant and {trunk / 'metrics.jsonl'} has no learning rate of step {step}; "
            "choose as_configured or rewarm"
        )
    run.write_json(FILE_NAME, {"run": str(trunk), "step": step, "learning_rate": rate})
    return rate


def _learning_rate(config: Training, updates: int) -> float:
    """Of the update after so many."""
    return float(config.optimizer.peak_lr * config.schedule.build(config.steps)(updates))


def _shown(rate: float | None) -> str:
    return "not known" if rate is None else f"{rate:.3g}"
