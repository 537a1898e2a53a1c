"""Distillation: a small model learns what a large one predicts, beside the same model on the text alone.

    python data/python.py --out corpora/python
    python recipes/distill.py cpu                         # a teacher, and a student of a tenth of its parameters
    efftrain teacher runs/distill/teacher --samples 50 --rows 9600    # its predictions, kept on disk
    python recipes/distill.py cpu --cache runs/distill/teacher-sampled50-rows9600 --out runs/distill/from-cache
    python recipes/distill.py cpu --compare               # cached, fewer tokens, online, starts; three seeds
    python recipes/distill.py v5e-64 --corpus corpora/python          # on every worker of a TPU slice

Any run of the same vocabulary can teach: ``--teacher RUN``, also one that ``efftrain compress`` quantised. Which
presets to try first, and what to do when distillation does not help: recipes/distillation.md.

A comparison writes ``comparison.json`` into the output folder; if it is interrupted, the same command continues it.

Measured: recipes/distillation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx

from efftrain import data
from efftrain.compress.distillation.build_teacher_cache import CacheOptions, build_cache
from efftrain.compress.distillation.distill import FromCache, FromTeacher
from efftrain.compress.distillation.student import equal_students
from efftrain.compress.distillation.student_run import StudentRun, student_program, train_student
from efftrain.compress.distillation.teacher_gain import teacher_gain
from efftrain.errors import ConfigError
from efftrain.experiment import presets
from efftrain.experiment.compare import Comparison, compare, on_test
from efftrain.experiment.experiment import finished
from efftrain.measure.scorecard.scorecard import FILE_NAME, Scorecard, table
from efftrain.models.config import ModelConfig, llama
from efftrain.models.decoder import Decoder
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.sharding import hosts
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective
from efftrain.train.optimizers import AdamW
from efftrain.train.run.directory import load_model_config

FEWER_TOKENS = 0.7  # share of the student's tokens with which a taught one may reach what the text alone gives
SHORT = 0.4  # share of the student's steps for the teacher beside every batch, and for its cached predictions
START_STEPS, START_ROWS = 0.05, 1024  # for each start: share of the student's steps, and rows of the test split


@dataclass(frozen=True, kw_only=True)
class Config(StudentRun):
    """A student.

    Attributes:
      teacher_model, teacher_training: the teacher that is trained beside the student if ``teacher`` is None.
      compare: train in other ways too.
      seeds: seeds of a comparison.
    """

    teacher_model: ModelConfig
    teacher_training: Training
    corpus: Path = Path("corpora/python")
    out: Path = Path("runs/distill/student")
    compare: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)


cpu = Config(
    model=llama(vocab_size=4096, d_model=64, n_layers=4, n_heads=2, d_ff=256, max_length=512, tied_embedding=True),
    training=Training(steps=500, batch_size=16, length=256, optimizer=AdamW(peak_lr=3e-3), checkpoint_every=100),
    teacher_model=llama(
        vocab_size=4096, d_model=256, n_layers=6, n_heads=4, d_ff=704, max_length=512, tied_embedding=True
    ),
    teacher_training=Training(
        steps=1200, batch_size=16, length=256, optimizer=AdamW(peak_lr=2e-3), checkpoint_every=100
    ),
    rows=9600,
)
gpu = replace(
    cpu,
    model=presets.llama_30m,
    training=replace(presets.gpu_training, optimizer=AdamW(peak_lr=2e-3)),
    teacher_model=presets.llama_300m,
    teacher_training=replace(presets.gpu_training, steps=10_000, optimizer=AdamW(peak_lr=1e-3), eval_every=1000),
    teacher_dtype="bfloat16",
    rows=None,
)
v5e_64 = replace(
    gpu,
    model=presets.llama_300m.replace(scan=True, remat="full"),
    training=replace(presets.v5e_64_training, optimizer=AdamW(peak_lr=1e-3)),
    teacher_model=presets.llama_3b,
    teacher_training=replace(presets.v5e_64_training, steps=40_000, optimizer=AdamW(peak_lr=4e-4), eval_every=1000),
)
configs = {"cpu": cpu, "gpu": gpu, "v5e-64": v5e_64}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective | FromTeacher | FromCache]:
    """The student and what it minimises: what ``fit`` trains, and what ``efftrain aot`` compiles."""
    return student_program(config, untrained=config.teacher_model)


def main(config: Config) -> Scorecard | Comparison:
    hosts.connect()
    if config.compare:
        return compare_ways(config)
    config = replace(config, seeds=())
    cards = []
    if config.teacher is None and needs_teacher(config):
        cards.append(found_or_trained(teacher_beside(config)))
        config = replace(config, teacher=teacher_beside(config).out)
    program(config)  # an error must appear before anything is trained
    if config.distill is not None:
        cards.append(found_or_trained(on_text(config)))
    cards.append(train(config))
    console.print(table(cards))
    return cards[-1]


def train(config: Config, evaluated_rows: int | None = None) -> Scorecard:
    return train_student(config, *program(config), evaluated_rows=evaluated_rows)


def found_or_trained(config: Config) -> Scorecard:
    return finished(config) or train(config)


def needs_teacher(config: Config) -> bool:
    return (config.distill is not None and config.cache is None) or config.initial != "random"


def teacher_beside(config: Config) -> Config:
    """The teacher that is trained beside a student."""
    how = {"model": config.teacher_model, "training": config.teacher_training, "rows": None}
    return replace(on_text(config), **how, out=config.out.with_name("teacher"))


def on_text(config: Config) -> Config:
    """The same student on the text alone, beside it."""
    out = config.out.with_name(f"{config.out.name}-text")
    alone = {"distill": None, "cache": None, "teacher": None, "teacher_dtype": None, "initial": "random"}
    return replace(config, **alone, out=out, compare=False, seeds=())


def shorter(config: Config, share: float) -> Config:
    steps = max(round(share * config.training.steps), 1)
    return replace(config, training=replace(config.training, steps=steps))


def compare_ways(config: Config) -> Comparison:
    """Compares students on the text alone, with cached predictions, on fewer tokens, with the teacher; then starts."""
    base, out = replace(config, compare=False, seeds=()), config.out.parent
    if base.distill is None or base.cache is not None:
        raise ConfigError(
            "--compare makes its own cache and compares a distilled student with others; give distill and no cache"
        )
    if base.teacher is None:
        found_or_trained(teacher_beside(base))
        base = replace(base, teacher=teacher_beside(base).out)
    Scorecard.read(base.teacher / FILE_NAME)  # a teacher that has not finished must fail before anything is trained
    options = CacheOptions(top_k=None, samples=50, rows=base.rows)
    cache = build_cache(base.teacher, options, corpus=base.corpus, out=out / "teacher-samples")
    cached = replace(base, cache=cache)
    variants = {
        "text": on_text(base),
        "samples": cached,
        "samples-70": shorter(cached, FEWER_TOKENS),
        "samples-short": shorter(cached, SHORT),
        "online-short": shorter(base, SHORT),
    }
    found = compare(variants, train, out=out, seeds=config.seeds)
    console.print(found.table())
    starts = compare_starts(cached, out, config.seeds)
    figures: dict[str, Any] = teacher_gain(found, base.teacher, base)
    figures["cache_bytes_per_token"] = data.TeacherCache.open(cache, verify=False).manifest["bytes_per_token"]
    found.write(out / "comparison.json", **figures, starts_bpb=starts)
    return found


def compare_starts(config: Config, out: Path, seeds: tuple[int, ...]) -> dict[str, list[float]]:
    """Bits per byte after a short training of students of equally many parameters, by how they start."""
    half, narrow = equal_students(load_model_config(config.teacher), config.training.length)
    starts = {
        "random, half of the layers": replace(config, model=half, initial="random"),
        "layers of the teacher": replace(config, model=half, initial="layers"),
        "random, narrower": replace(config, model=narrow, initial="random"),
        "cut in width": replace(config, model=narrow, initial="cut"),
    }
    variants = {f"start{i}": shorter(start, START_STEPS) for i, start in enumerate(starts.values())}
    train_short, report = partial(train, evaluated_rows=START_ROWS), partial(on_test, rows=START_ROWS)
    found = compare(variants, train_short, out=out, seeds=seeds, report=report)
    return {name: [card.value("bpb") for card in found.cards[f"start{i}"]] for i, name in enumerate(starts)}


if __name__ == "__main__":
    run_recipe(main, configs)
