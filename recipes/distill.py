"""Distillation: a small model learns what a large one predicts, beside the same model on the text alone.

    python data/python.py --out corpora/python
    python recipes/distill.py cpu                         # a teacher, and a student of a tenth of its parameters
    efftrain teacher runs/distill/teacher --samples 50 --rows 9600    # its predictions, kept on disk
    python recipes/distill.py cpu --cache runs/distill/teacher-sampled50-rows9600 --out runs/distill/from-cache
    python recipes/distill.py cpu --compare               # cached, fewer tokens, online, starts; three seeds
    python recipes/distill.py v5e-64 --corpus corpora/python          # on every worker of a TPU slice

Any run of the same vocabulary teaches: ``--teacher RUN``, also one that ``efftrain compress`` quantised. Which presets
to begin with, and what to do when it does not help: recipes/distillation.md.

A comparison leaves ``comparison.json`` in the output folder; when interrupted it continues.

Measured, cpu, bits per byte of seeds 0, 1, 2 (2 cores of an Intel Xeon; tests/bench/results/distill_quality.json):
with ``--training.steps 2000`` the text alone 1.605, 1.560, 1.683, from 50 samples a token of a teacher of 1.360
1.454, 1.451, 1.450; a unigram model has 2.869. With 500 steps 2.019, 2.041, 2.033 and 1.903, 1.894, 1.887, on 70 % of
the tokens 2.007, 2.093, 2.027; with 200 from samples 2.255, 2.316, 2.286, with the teacher itself 2.252, 2.305,
2.284. Starts, behind 25 steps, means on 1,024 rows: half of the layers 2.535 (at random 2.768), cut in width 1.494
(at random 2.873). gpu, v5e-64: not measured; they compile for v5e, v5p, v6e.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flax import nnx

import efftrain
from efftrain import data
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.distillation.build_teacher_cache import CacheOptions, build_cache
from efftrain.compress.distillation.distill import (
    Distill,
    FromCache,
    FromTeacher,
    distilled,
    extra_flops,
    forward_flops,
    teacher_run,
)
from efftrain.compress.distillation.student import cut_from, from_layers, same_parameters, spread_layers
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.structured.shape import Shape, shaped
from efftrain.compress.structured.shapes import candidates
from efftrain.config import finite_json
from efftrain.errors import ConfigError
from efftrain.experiment.compare import Comparison, compare
from efftrain.experiment.experiment import Experiment, finished, reported, train_and_score
from efftrain.measure.cost.parameters import count_parameters
from efftrain.measure.quality.unigram import unigram_bpb
from efftrain.measure.scorecard.scorecard import FILE_NAME, Scorecard, table
from efftrain.models.config import ModelConfig, llama
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.sharding import hosts
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.config import Training
from efftrain.train.inputs import model_digest
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.objectives.teacher import Teacher
from efftrain.train.optimizers import AdamW
from efftrain.train.run.directory import load_model_config

CALIBRATION_ROWS = 128  # of the training split, for what is cut out of a teacher
FEWER_TOKENS = 0.7  # of the student's, with which a taught one may reach what the text alone brings
SHORT = 0.4  # of the student's steps, with the teacher beside every batch and with what was kept of it
START_STEPS, START_ROWS = 0.05, 1024  # of the student's steps and of the test split, for each start


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """A student.

    Attributes:
      distill: what it learns from its teacher. None: nothing, it has the text alone.
      teacher: the run directory of a teacher. None: one is trained beside the student.
      teacher_model, teacher_training: of that one.
      teacher_dtype: of its matrices while it teaches; it is frozen, so that bfloat16 is enough.
      cache: what ``efftrain teacher`` kept of the teacher for the rows that the student reads. None: the teacher reads
        every batch too.
      rows: only the first so many of the training split are read. None: all, or those of the cache.
      initial: the student begins at random, with layers of its teacher (of the same width), or with what is most
        important of it (of the same head size).
      compare: train in other ways too.
      seeds: of a comparison.
    """

    distill: Distill | None = field(default_factory=Distill)
    teacher: Path | None = None
    teacher_model: ModelConfig
    teacher_training: Training
    teacher_dtype: str | None = None
    cache: Path | None = None
    rows: int | None = None
    initial: Literal["random", "layers", "cut"] = "random"
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
gpu = replace(  # about 30M parameters by 300M
    cpu,
    model=llama(
        vocab_size=4096,
        d_model=448,
        n_layers=12,
        n_heads=7,
        d_ff=1216,
        max_length=2048,
        tied_embedding=True,
        dtype="bfloat16",
    ),
    training=replace(
        cpu.training,
        steps=5000,
        batch_size=64,
        length=2048,
        optimizer=AdamW(peak_lr=2e-3),
        eval_every=500,
        checkpoint_every=500,
    ),
    teacher_model=llama(
        vocab_size=4096,
        d_model=1024,
        n_layers=24,
        n_heads=16,
        d_ff=2752,
        max_length=2048,
        tied_embedding=True,
        dtype="bfloat16",
    ),
    teacher_training=replace(
        cpu.teacher_training,
        steps=10_000,
        batch_size=64,
        length=2048,
        optimizer=AdamW(peak_lr=1e-3),
        eval_every=1000,
        checkpoint_every=500,
    ),
    teacher_dtype="bfloat16",
    rows=None,
)
v5e_64 = replace(  # about 300M parameters by 3B
    gpu,
    model=gpu.teacher_model.replace(scan=True, remat="full"),
    training=replace(
        gpu.training, steps=20_000, batch_size=512, optimizer=AdamW(peak_lr=1e-3), mesh=MeshConfig(replica=-1, fsdp=16)
    ),
    teacher_model=llama(
        vocab_size=4096,
        d_model=2560,
        n_layers=40,
        n_heads=20,
        n_kv_heads=10,
        d_ff=6912,
        max_length=2048,
        dtype="bfloat16",
        scan=True,
        remat="full",
    ),
    teacher_training=replace(
        gpu.teacher_training,
        steps=40_000,
        batch_size=512,
        optimizer=AdamW(peak_lr=4e-4),
        mesh=MeshConfig(replica=-1, fsdp=16),
    ),
)
configs = {"cpu": cpu, "gpu": gpu, "v5e-64": v5e_64}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective | FromTeacher | FromCache]:
    """The student and what it minimises: what ``fit`` trains, and what ``efftrain aot`` compiles."""

    def build(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config.model, rngs=rngs)

    how = config.distill
    if how is None:
        return build, next_token_loss
    if config.cache is not None:
        return build, FromCache(how=how, tail=open_cache(config).plan.kind == "top_k")
    if config.teacher is None:  # not trained yet: enough to be compiled
        teacher = Teacher(config=config.teacher_model, restore=not_trained, dtype=config.teacher_dtype)
    else:
        teacher = teacher_run(config.teacher, config.corpus, dtype=config.teacher_dtype)
    return distilled(build, config.model, how, teacher)


def not_trained(_: nnx.State) -> nnx.State:
    raise ConfigError("the student has no teacher yet; train one, or give --teacher RUN")


def open_cache(config: Config) -> data.TeacherCache:
    cache = data.TeacherCache.open(config.cache, verify=False)
    if config.teacher is not None:
        cache.check_teacher(model_digest(efftrain.load(config.teacher)))
    return cache


def main(config: Config) -> Scorecard | Comparison:
    hosts.connect()
    if config.compare:
        return compare_ways(config)
    config = replace(config, seeds=())
    cards = []
    if config.teacher is None and needs_teacher(config):
        cards.append(teach(config))
        config = replace(config, teacher=beside(config).out)
    program(config)  # refuses before anything is trained
    if config.distill is not None:
        cards.append(found_or_trained(on_text(config)))
    cards.append(train(config))
    console.print(table(cards))
    return cards[-1]


def train(config: Config, evaluated_rows: int | None = None) -> Scorecard:
    """The student, evaluated on so many rows (None: all); its teacher must be there."""
    if config.cache is not None and config.distill is None:
        raise ConfigError("a cache is for a student that is taught; leave it out, or give it distill")
    if config.distill is not None and config.distill.on_policy and config.distill.on_policy.prompt is None:
        raise ConfigError("text without answers has no prompts of its own; set distill.on-policy.prompt, such as 64")
    if config.distill is not None and config.distill.on_policy:
        end = data.open(config.corpus, verify=False).end_of_text_id
        if config.distill.on_policy.end_token not in (None, end):
            raise ConfigError(
                f"distill.on-policy.end-token is not the end of text of {config.corpus}; set it to {end}, or None"
            )
    build, objective = program(config)
    extra = 0.0
    if isinstance(objective, FromTeacher):
        extra = extra_flops(objective.how, config.model, objective.teacher.config, config.training.length)
    part = data.Part(path=config.corpus, rows=config.rows, teacher=config.cache)
    at_random = config.initial == "random"
    return train_and_score(
        config,
        build,
        objective,
        part=part,
        initial=None if at_random else lambda: begun(config),
        source=None if at_random else config.teacher,
        extra_flops=extra,
        evaluated_rows=evaluated_rows,
    )[1]


def found_or_trained(config: Config, evaluated_rows: int | None = None) -> Scorecard:
    """The card of a run that is done, where its configuration and code are these."""
    return finished(config) or train(config, evaluated_rows)


def needs_teacher(config: Config) -> bool:
    return (config.distill is not None and config.cache is None) or config.initial != "random"


def beside(config: Config) -> Config:
    """The teacher that is trained beside a student."""
    return replace(
        on_text(config),
        model=config.teacher_model,
        training=config.teacher_training,
        rows=None,
        out=config.out.with_name("teacher"),
    )


def on_text(config: Config) -> Config:
    """The same student on the text alone, beside it."""
    out = config.out.with_name(f"{config.out.name}-text")
    alone = {"distill": None, "cache": None, "teacher": None, "teacher_dtype": None, "initial": "random"}
    return replace(config, **alone, out=out, compare=False, seeds=())


def teach(config: Config) -> Scorecard:
    """Trains the teacher, or reads its card."""
    return found_or_trained(beside(config))


def begun(config: Config) -> Decoder:
    """The student before its first step, made of its teacher."""
    pieces = LayerwiseModel.read(config.teacher)
    if config.initial == "layers":
        model = from_layers(pieces, spread_layers(config.model.n_layers, pieces.config.n_layers))
        if not same_parameters(model.config, config.model):
            raise ConfigError("a student of its teacher's layers has its widths too; change model, or begin at random")
        return model
    return cut_from(
        pieces, config.model, CorpusRows(config.corpus, config.training.length).calibration(CALIBRATION_ROWS)
    )


def compare_ways(config: Config) -> Comparison:
    """The text alone, what is kept of the teacher, fewer tokens, the teacher beside every batch; then starts."""
    base, out = replace(config, compare=False, seeds=()), config.out.parent
    if base.distill is None or base.cache is not None:
        raise ConfigError("--compare makes its cache and compares a taught student with others; give distill, no cache")
    if base.teacher is None:
        taught_by = teach(base)
        base = replace(base, teacher=beside(base).out)
    elif (base.teacher / FILE_NAME).exists():
        taught_by = Scorecard.read(base.teacher / FILE_NAME)
    else:
        raise ConfigError(f"{base.teacher} has no {FILE_NAME}; give a run that is finished")
    options = CacheOptions(top_k=None, samples=50, rows=base.rows)
    cache = build_cache(base.teacher, options, corpus=base.corpus, out=out / "teacher-samples")

    def shorter(share: float) -> Training:
        return replace(base.training, steps=max(round(share * base.training.steps), 1))

    variants = {
        "text": on_text(base),
        "samples": replace(base, cache=cache),
        "samples-70": replace(base, cache=cache, training=shorter(FEWER_TOKENS)),
        "samples-short": replace(base, cache=cache, training=shorter(SHORT)),
        "online-short": replace(base, training=shorter(SHORT)),
    }
    found = compare(variants, train, out=out, seeds=config.seeds)
    console.print(found.table())
    starts = compare_starts(replace(base, cache=cache), out, config.seeds)
    taught_by = reported(taught_by, base.teacher, base.corpus, base.training)
    plain = unigram_bpb(data.open(base.corpus, verify=False), split=taught_by.figures["bpb"].split)
    teacher = taught_by.value("bpb")
    figures = {
        "unigram_bpb": plain,
        "teacher_bpb": teacher,
        "parameters": {
            "teacher": taught_by.figures["parameters_total"].value,
            "student": found.cards["text"][0].figures["parameters_total"].value,
        },
        "kept_share_of_gain": {
            name: [(plain - card.value("bpb")) / (plain - teacher) for card in cards]
            for name, cards in found.cards.items()
        },
        "cache_bytes_per_token": data.TeacherCache.open(cache, verify=False).manifest["bytes_per_token"],
        "teacher_flops_per_token": forward_flops(load_model_config(base.teacher), base.training.length),
        "starts_bpb": starts,
    }
    found.write(out / "comparison.json", **figures)
    console.print(json.dumps(finite_json(figures), indent=1))
    return found


def compare_starts(config: Config, out: Path, seeds: tuple[int, ...]) -> dict[str, list[float]]:
    """Bits per byte of students of equally many parameters, with half of the teacher's layers or all of them narrower,
    behind a short training; by how they begin."""
    whole = load_model_config(config.teacher)
    keep = spread_layers(max(whole.n_layers // 2, 1), whole.n_layers)
    half = shaped(whole, replace(Shape.of(whole), n_layers=len(keep)), keep)
    share = count_parameters(abstract_decoder(half)).total / count_parameters(abstract_decoder(whole)).total
    shape = candidates(whole, share, axis="width", metric="parameters", length=config.training.length)[0]
    narrow = shaped(whole, shape, range(whole.n_layers))
    training = replace(config.training, steps=max(round(START_STEPS * config.training.steps), 1))
    ways: dict[str, tuple[ModelConfig, Any]] = {
        "random, half of the layers": (half, "random"),
        "layers of the teacher": (half, "layers"),
        "random, narrower": (narrow, "random"),
        "cut in width": (narrow, "cut"),
    }
    found: dict[str, list[float]] = {}
    for i, (name, (model, initial)) in enumerate(ways.items()):
        for seed in seeds:
            start = out / f"start{i}-seed{seed}"
            seeded = replace(training, seed=seed)
            student = replace(config, model=model, initial=initial, training=seeded, out=start)
            card = reported(found_or_trained(student, START_ROWS), start, student.corpus, seeded, rows=START_ROWS)
            found.setdefault(name, []).append(card.value("bpb"))
        console.print(f"{name}: {statistics.fmean(found[name]):.4f} bits per byte", markup=False)
    return found


if __name__ == "__main__":
    run_recipe(main, configs)
