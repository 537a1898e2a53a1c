"""Rounds of pruning and recovery training, and the search for a shape."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from efftrain import data
from efftrain.compress.commands.compression import AnyPrune
from efftrain.compress.commands.prune import Prune
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.structured_prune import StructuredPrune
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.origin import CUT, made_otherwise, origin, rounds_are_done
from efftrain.compress.recover import recover, recovery_training
from efftrain.compress.stage import make_stage
from efftrain.config import from_json, to_json
from efftrain.errors import RunError
from efftrain.experiment.experiment import reported
from efftrain.measure.measurements import write_json
from efftrain.measure.quality.held_out import CHOICES
from efftrain.measure.scorecard.scorecard import FILE_NAME as SCORECARD
from efftrain.measure.scorecard.scorecard import Scorecard
from efftrain.progress import console
from efftrain.train.config import Training
from efftrain.train.run.directory import load_model_config, read_json

SHAPES = "shapes.json"
TRIAL = 0.1  # share of the tokens of recovery training that each shape of a search is trained on


def compress_in_rounds(
    run: Path,
    options: AnyPrune,
    recovery: RecoveryTraining,
    text: CorpusRows,
    out: Path,
    evaluated_rows: int | None,
) -> Scorecard:
    """Prunes and trains, once per round."""
    stages, tokens = out.with_name(f"{out.name}.stages"), recovery.tokens // recovery.rounds
    trained, sparse = run, isinstance(options, Prune)
    search = options.search if isinstance(options, StructuredPrune) else None
    teacher = run if recovery.distill else None
    training_for = partial(recovery_training, trained, options=recovery, length=text.length, sparse=sparse)
    # Too few tokens or a split that is too short must fail before anything is computed.
    data.PackedRows(data.open(text.corpus, verify=False), "train", text.length)
    training_for(tokens if search is None else round(TRIAL * tokens))
    training = training_for(tokens, number=recovery.rounds)
    report = partial(reported, run=out, corpus=text.corpus, rows=evaluated_rows, chosen=options.chosen_on)
    if rounds_are_done(run, options, text, out, stages, evaluated_rows):
        console.print(f"{out} is converted already; nothing to do", markup=False)
        return report(Scorecard.read(out / SCORECARD), training=training)
    for number in range(1, recovery.rounds + 1):
        cut, once = stages / f"{number}-cut", options.in_round(number)
        if isinstance(options, StructuredPrune) and search is not None:
            trial = training_for(round(TRIAL * tokens), number=number)
            once = in_best_shape(run, options, number, text, stages / f"{number}-search", trial, teacher)
        make_stage(run, once, text, cut)
        last = number == recovery.rounds
        run = out if last else stages / f"{number}-recovered"
        rows = evaluated_rows if last else options.rows
        training = training_for(tokens, number=number, last=last)
        card = recover(cut, training, run, text.corpus, sparse=sparse, rows=rows, teacher=teacher)
    return report(card, training=training)


def in_best_shape(
    run: Path,
    options: StructuredPrune,
    number: int,
    text: CorpusRows,
    folder: Path,
    training: Training,
    teacher: Path | None,
) -> StructuredPrune:
    """The pruning of a round to the shape whose model has the lowest bits per byte after a short training.

    Args:
      run: run directory of the model that is pruned in this round.
      options: the command, with ``search``.
      number: number of the round, from 1.
      text: the corpus; the shape is chosen on its first validation rows.
      folder: where the trials are kept.
      training: training of each trial.
      teacher: run directory of the teacher. None: trials train on the text.

    Raises:
      RunError: ``folder`` holds trials of something else, or no trial has finite bits per byte.
    """
    once = options.in_round(number)
    made_from = origin(run, options, text, rooms=CUT)
    before = read_json(folder / SHAPES) if (folder / SHAPES).exists() else {}
    reason = made_otherwise(before, made_from) if before else None
    if reason and any(path.name != SHAPES for path in folder.iterdir()):
        raise RunError(f"{folder} was made with {reason}; choose another --out")
    if before and not reason:  # read again, because shapes by latency would differ with each measurement
        shapes = [from_json(shape) for shape in before["shapes"]]
    else:
        shapes = once.shapes(load_model_config(run), options.axis, text.length)[: options.search]
        write_json(folder / SHAPES, made_from | {"shapes": [to_json(shape) for shape in shapes]})
    bpb = []
    for i, shape in enumerate(shapes):
        console.print(f"shape {i + 1} of {len(shapes)} found: {shape}", markup=False)
        cut = folder / f"{i + 1}-cut"
        make_stage(run, replace(once, shape=shape), text, cut)
        card = recover(
            cut,
            training,
            folder / f"{i + 1}",
            text.corpus,
            sparse=False,
            rows=options.rows,
            teacher=teacher,
        )
        bpb.append(card.value("bpb"))
    if np.isnan(bpb).all():
        raise RunError(
            f"no shape of {folder} has finite bits per byte after its training; remove less (a smaller --ratio)"
        )
    figures = {"bpb": bpb, "split": CHOICES, "rows": options.rows}
    write_json(folder / SHAPES, made_from | {"shapes": [to_json(shape) for shape in shapes]} | figures)
    return replace(once, shape=shapes[int(np.nanargmin(bpb))])
