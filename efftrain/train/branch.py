"""A run that goes on from a checkpoint of another one: its parameters, optimizer state and position in the data.

What only concerns the end of a run (quantisation while the learning rate decays, another schedule) is tried on top of
one trunk, and compared with it from the same state on.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from efftrain.errors import ConfigError, RunError
from efftrain.models.quantization import RATIO
from efftrain.progress import console
from efftrain.train.checkpoints import Checkpoints, flatten, unflatten
from efftrain.train.program import Program
from efftrain.train.run import checkpoint_directory, read_json
from efftrain.train.state import TrainState

WRAPPED, PLAIN = "opt_state/inner/", "opt_state/"  # the state of an optimizer within another's, and of one alone
# In the names of what a trunk need not have: it starts as built.
COUNT, FRESH, KEPT = "opt_state/count", "opt_state/fresh", "opt_state/kept/"
HELPERS = "/helpers/"  # what an objective trains beside the model
NEW = (RATIO, "opt_state/masks/", KEPT, FRESH, COUNT, HELPERS)


def parse_branch(text: str, steps: int) -> tuple[Path, int]:
    """``RUN@STEP``: a run directory, and the step of one of its checkpoints, before the last step of this run.

    Raises:
      ConfigError: something else.
    """
    run, at, step = text.rpartition("@")
    if not (run and at and step.isdigit()):
        raise ConfigError(
            f"training.branch is {text!r}; give a run and the step of a checkpoint, such as runs/dense@480"
        )
    if int(step) >= steps:
        raise ConfigError(f"training.branch is {text!r} and training.steps {steps}; a branch needs steps of its own")
    return Path(run), int(step)


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
