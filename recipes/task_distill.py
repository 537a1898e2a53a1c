"""A small model for one task, taught by a larger one; beside it the same student without a teacher.

    python recipes/task_distill.py cpu                         # a shop's questions, made up here
    python recipes/task_distill.py amounts                     # amounts in words to figures: it generates
    python recipes/task_distill.py banking77 --labelled train.csv --test test.csv --general runs/dense --compare
    python recipes/task_distill.py cpu --labelled MINE.csv --unlabelled MORE.csv --test HELD_OUT.csv

Files are CSV with a header (columns ``text`` and ``label``, or as ``--text`` and ``--label`` say) or JSON lines.
Banking77: github.com/PolyAI-LDN/task-specific-datasets, folder banking_data (13,083 questions, 77 intents, CC BY 4.0).

The teacher starts from a general model (``--general``, the run of any recipe) or at random, and is trained on the
labelled questions. Then it labels those, the unlabelled ones, and questions that it makes up itself (``--augmented``);
the student, with a vocabulary of its own, learns from these. Validation is a part of the labelled file; the test is
scored once, at the end. ``--compare`` repeats it with several seeds, beside the general model by the usual cheap
means: a linear probe, and examples in its prompt.

A result is ``task.json`` in the output folder; if it is interrupted, the same command continues it.

Measured: recipes/task-distillation.md.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from efftrain.code_identity import code_identity
from efftrain.compress.task.general_model import few_shot_on_task, probe_on_task
from efftrain.compress.task.task_distillation import TaskDistillation, distil_task
from efftrain.compress.task.task_report import summary, task_table
from efftrain.compress.task.task_run import Learner
from efftrain.compress.task.task_texts import Augmentation
from efftrain.config import digest, to_json
from efftrain.data.tasks.synthetic import write_amounts, write_questions
from efftrain.data.tasks.task import Task, TaskFiles, open_task
from efftrain.errors import ConfigError
from efftrain.measure.measurements import Measurements, write_json
from efftrain.models.config import llama
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.sharding.hosts import check_single_process
from efftrain.train.config import Training
from efftrain.train.inputs import input_contents
from efftrain.train.optimizers import AdamW, Muon
from efftrain.train.run.environment import environment


@dataclass(frozen=True, kw_only=True)
class Config(TaskDistillation):
    """A task, its teacher and its student.

    Attributes:
      made_up: the task if no files are given.
      labelled, test, unlabelled, text, label, generates, validation: see ``data.tasks.task.TaskFiles``.
      out: the folder of all runs.
      compare: train with several seeds, and measure the general model too.
      seeds: seeds of a comparison; without one, the first of them is used.
    """

    made_up: Literal["shop", "amounts"] = "shop"
    labelled: Path | None = None
    test: Path | None = None
    unlabelled: Path | None = None
    text: str = "text"
    label: str = "label"
    generates: bool = False
    validation: float = 0.1
    out: Path = Path("runs/task")
    compare: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)


cpu = Config(
    teacher=Learner(
        model=llama(vocab_size=1024, d_model=192, n_layers=4, n_heads=4, d_ff=512, max_length=128, tied_embedding=True),
        training=Training(steps=200, batch_size=16, length=128, optimizer=AdamW(peak_lr=2e-3)),
    ),
    student=Learner(
        model=llama(vocab_size=512, d_model=64, n_layers=2, n_heads=2, d_ff=128, max_length=128, tied_embedding=True),
        training=Training(steps=500, batch_size=16, length=128, optimizer=AdamW(peak_lr=4e-3)),
        vocabulary=512,
    ),
    augment=Augmentation(per_label=100),
)
amounts = replace(
    cpu,
    made_up="amounts",
    text="prompt",
    label="completion",
    generates=True,
    augment=Augmentation(threshold=0.6, temperature=0.7),
    out=Path("runs/amounts"),
)
banking77 = replace(
    cpu,
    label="category",
    teacher=Learner(  # the model is the general one's where there is one
        model=llama(vocab_size=4096, d_model=256, n_layers=6, n_heads=4, d_ff=704, max_length=512, tied_embedding=True),
        training=Training(steps=600, batch_size=16, length=160, optimizer=Muon(peak_lr=3e-3)),
        vocabulary=4096,
        word_dropout=0.3,
    ),
    student=Learner(
        model=llama(vocab_size=1024, d_model=128, n_layers=2, n_heads=4, d_ff=256, max_length=256, tied_embedding=True),
        training=Training(steps=400, batch_size=16, length=256, optimizer=Muon(peak_lr=3e-3)),
        word_dropout=0.3,
    ),
    alpha=0.5,
    augment=Augmentation(per_label=200),
    augmented=False,
    out=Path("runs/banking77"),
)
gpu = replace(
    banking77,
    teacher=replace(
        banking77.teacher,
        model=llama(vocab_size=4096, d_model=768, n_layers=12, n_heads=12, d_ff=2048, max_length=512,
                    tied_embedding=True, dtype="bfloat16"),
        training=replace(banking77.teacher.training, steps=1500, batch_size=64, optimizer=AdamW(peak_lr=5e-4)),
    ),
    student=replace(
        banking77.student,
        model=llama(vocab_size=2048, d_model=256, n_layers=4, n_heads=4, d_ff=704, max_length=256,
                    tied_embedding=True, dtype="bfloat16"),
        training=replace(banking77.student.training, steps=4000, batch_size=64, optimizer=AdamW(peak_lr=2e-3)),
        vocabulary=2048,
    ),
    augment=Augmentation(per_label=1000),
)  # fmt: skip
configs = {"cpu": cpu, "amounts": amounts, "banking77": banking77, "gpu": gpu}


def main(config: Config) -> dict[str, Any]:
    check_single_process("a task is distilled")
    task = open_task(task_files(config))
    for reason, n in task.removed.items():
        console.print(f"removed: {n} texts ({reason})", markup=False)
    parts = {part: len(getattr(task, part)) for part in ("train", "validation", "unlabelled", "test")}
    console.print(f"task: {len(task.labels)} labels; {parts}", markup=False)
    seeds = config.seeds if config.compare else config.seeds[:1]
    made_from = {"config": digest(replace(config, compare=False)), "task": task.fingerprint}
    made_from["inputs"] = input_contents(config)
    with Measurements(config.out / "task.json", made_from, code_identity(config, main)) as store:
        general = general_model(config, task, seeds, store)
        runs = [distil_task(config, task, config.out, seed=seed, store=store) for seed in seeds]
        models = {name: [figures[name] for figures in runs] for name in runs[0]} | general
        found = {
            "seeds": list(seeds),
            "environment": environment(),
            "config": to_json(config),
            "task": parts | {"labels": len(task.labels), "removed": task.removed},
            "models": {name: summary(values) for name, values in models.items()},
            "taught": {str(seed): store.cell(f"taught, seed {seed}", dict) for seed in seeds},
        }
        write_json(config.out / "task.json", found)
        store.remove()
    console.print(task_table(found["models"], seeds))
    return found


def task_files(config: Config) -> TaskFiles:
    """The given files, or those of a made-up task."""
    if (config.labelled is None) != (config.test is None):
        raise ConfigError("a task of your own needs both --labelled and --test; give the other one too")
    labelled, test, unlabelled = config.labelled, config.test, config.unlabelled
    if labelled is None:
        if unlabelled is not None:
            raise ConfigError("--unlabelled belongs to a task of your own; give --labelled and --test too")
        folder = config.out / "examples"
        (write_questions if config.made_up == "shop" else write_amounts)(folder)
        labelled, test, unlabelled = (folder / f"{part}.csv" for part in ("labelled", "test", "unlabelled"))
    columns = {name: getattr(config, name) for name in ("text", "label", "generates", "validation")}
    return TaskFiles(labelled=labelled, test=test, unlabelled=unlabelled, **columns)


def general_model(
    config: Config, task: Task, seeds: tuple[int, ...], store: Measurements
) -> dict[str, list[dict[str, float]]]:
    """Figures of the general model for each seed, in a comparison for a task with labels."""
    if not config.compare or config.general is None or not task.labels:
        return {}
    of = config.general, task, config.tokenizer
    probe = store.cell("general, probe", lambda: probe_on_task(*of))
    prompted = [
        store.cell(f"general, few-shot, seed {seed}", lambda seed=seed: few_shot_on_task(*of, seed=seed))
        for seed in seeds
    ]
    return {"general, probe": [probe] * len(seeds), "general, few-shot": prompted}


if __name__ == "__main__":
    run_recipe(main, configs)
