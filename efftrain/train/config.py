"""The configuration of a training run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from efftrain.errors import ConfigError
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.metrics.profile import parse_steps
from efftrain.train.optimizers import AdamW, OptimizerConfig
from efftrain.train.schedules import ScheduleConfig, WarmupStableDecay
from efftrain.train.supervision.watchdog import Watchdog

ResumeSchedule = Literal["as_configured", "constant", "rewarm"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Configuration of a training run.

    Attributes:
      steps: number of steps of the whole run.
      batch_size: rows per step, over all devices.
      length: tokens per row.
      optimizer: the optimizer and its peak learning rate.
      schedule: the schedule of the learning rate.
      n_microbatches: number of parts into which the rows of a step are split and processed one after the other; saves
        memory, and time where memory is slow.
      clip_norm: largest global gradient norm. None: no clipping.
      ema_decay: keep an exponential moving average of the parameters with this decay, and evaluate and load the
        average. The decay grows to this value with the updates, see ``averages.average_decay``. A run that an earlier
        version began with a constant decay continues with the growing one, so that the share of the initial parameters
        in its average fades. None: no average.
      seed: seed of the parameters and of all randomness in training; the data have their own seed.
      max_bad_steps: stop after this many consecutive steps whose loss or gradient was not finite; each such step is
        skipped and counted.
      eval_every: steps between evaluations. None: evaluate only at the end.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: number of newest checkpoints that are kept.
      keep_every: also keep every checkpoint whose step is a multiple of this. None: keep only the newest.
      checkpoints: folder for the checkpoints of this run, which may be in a bucket (gs://bucket/run). None: in the run
        directory.
      resume_from: start from a checkpoint of another run, such as runs/dense@480 for step 480, with its optimizer
        state and its position in the data. None: start from the beginning.
      resume_schedule: the learning rate after ``resume_from``. "as_configured": that of ``schedule`` at its step, which
        is smooth where the other run was in its stable phase (Haegele et al. 2024). "constant": the last one of the
        other run, until ``schedule`` is below it. "rewarm": all of ``schedule``, warm-up included, over the added steps
        (Ibrahim et al. 2024). None: "as_configured", with a warning where the rate more than doubles.
      finetune: start from the model of another run, such as runs/dense: from its parameters alone (the averaged ones if
        it keeps them), with a new optimizer state, at the beginning of the data. None: start from random parameters.
      mesh: how the devices form a mesh.
      profile: first and last step of a profiler trace, such as 10:15; it is written to the run directory. None: no
        trace.
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
    resume_from: str | None = None
    resume_schedule: ResumeSchedule | None = None
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
        if self.resume_from is None and self.resume_schedule is not None:
            raise ConfigError(
                "training.resume_schedule has no effect without training.resume_from; set both, or neither"
            )
        if self.resume_from is not None:
            parse_resume_from(self.resume_from, self.steps)
            if self.finetune is not None:
                raise ConfigError("training.resume_from and training.finetune are both set; set only one of them")

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """First and last step of the profiler trace; None if there is none."""
        return None if self.profile is None else parse_steps(self.profile, self.steps)

    @property
    def tokens(self) -> int:
        """Number of tokens that the whole run reads."""
        return self.steps * self.batch_size * self.length

    @property
    def first_step(self) -> int:
        """Number of steps that were made before this run: those before ``resume_from``, or 0."""
        return 0 if self.resume_from is None else parse_resume_from(self.resume_from, self.steps)[1]

    @property
    def started_from(self) -> Path | None:
        """The run that ``resume_from`` or ``finetune`` names; None if there is none."""
        return self.finetune if self.resume_from is None else parse_resume_from(self.resume_from, self.steps)[0]


def parse_resume_from(text: str, steps: int) -> tuple[Path, int]:
    """Parses ``RUN@STEP``: a run directory and the step of one of its checkpoints.

    Args:
      text: value of ``Training.resume_from``.
      steps: number of steps of the new run; the checkpoint must be of an earlier step.

    Raises:
      ConfigError: the text has another form, or the step is not below ``steps``.
    """
    run, at, step = text.rpartition("@")
    if not (run and at and step.isdigit()):
        raise ConfigError(
            f"training.resume_from is {text!r}; give a run and the step of a checkpoint, such as runs/dense@480"
        )
    if int(step) >= steps:
        raise ConfigError(
            f"training.resume_from is {text!r} and training.steps {steps}; give more steps than the checkpoint has"
        )
    return Path(run), int(step)
