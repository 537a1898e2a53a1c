"""What benchmarks share: a training step to be timed, and programs that take turns."""

import statistics
import time
from collections.abc import Mapping

import jax
import numpy as np

from efftrain.compress.layerwise.calibration import CalibrationRows
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.sharding.mesh import make_mesh
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.objectives.teacher import TeacherObjective
from efftrain.train.program import Wrap, make_program


class Stepper:
    """The compiled training step of a model, and its state."""

    def __init__(
        self,
        model: ModelConfig,
        training: Training,
        wrap: Wrap | None = None,
        *,
        objective: Objective | TeacherObjective = next_token_loss,
        more: Mapping[str, np.ndarray] | None = None,
    ):
        """``more``: arrays that the objective finds in a batch beside the text."""
        program = make_program(lambda rngs: Decoder(model, rngs=rngs), objective, training, wrap)
        mesh = make_mesh(training.mesh, jax.devices()[:1])
        self._frozen = program.frozen(mesh)
        self._state = jax.jit(program.init)()
        tokens = np.random.default_rng(0).integers(0, 4096, (training.batch_size, training.length + 1), np.int32)
        ones = np.ones_like(tokens[:, 1:])
        positions = np.tile(np.arange(training.length, dtype=np.int32), (training.batch_size, 1))
        self._batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": ones, "positions": positions}
        self._batch |= {"mask": ones.astype(bool)} | dict(more or {})
        arguments = self._state, self._batch, self._frozen
        self._run = jax.jit(program.step, donate_argnums=0).lower(*arguments).compile()

    def __call__(self) -> None:
        self._state, metrics = self._run(self._state, self._batch, self._frozen)
        jax.block_until_ready((self._state, metrics))


def in_turn(programs: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each; they take turns, the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def random_text(rows: int = 128) -> CalibrationRows:
    tokens = np.random.default_rng(0).integers(0, 4096, (rows, 256)).astype(np.int32)
    return CalibrationRows(tokens, np.ones_like(tokens), np.tile(np.arange(256, dtype=np.int32), (rows, 1)))
