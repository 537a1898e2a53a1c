"""What recipes share: one run on a corpus from its batches to its scorecard."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

from efftrain import data
from efftrain.errors import ConfigError
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.quality.evaluate import Evaluator
from efftrain.measure.quality.held_out import HeldOut, choosing, reporting
from efftrain.measure.scorecard.score import quality_figures, score
from efftrain.measure.scorecard.scorecard import FILE_NAME, Scorecard
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.progress import console
from efftrain.sharding import hosts
from efftrain.sharding.layout import state_shardings, with_shardings
from efftrain.sharding.mesh import make_mesh
from efftrain.sharding.rules import DEFAULT_RULES, ShardingRules, use
from efftrain.train.batches import batch_part
from efftrain.train.config import Training
from efftrain.train.inputs import input_contents
from efftrain.train.loop import fit
from efftrain.train.metrics.metric_sink import MetricSink
from efftrain.train.objectives.objective import Objective
from efftrain.train.objectives.teacher import TeacherObjective
from efftrain.train.program import Wrap
from efftrain.train.run.directory import (
    Run,
    checkpoint_directory,
    has_begun,
    load_model_config,
    load_variables,
    read_json,
)
from efftrain.train.run.tokenizers import FILE_NAME as TOKENIZER
from efftrain.train.run.tokenizers import check_tokenizer
from efftrain.train.start import check_start


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What every recipe's configuration has; a recipe adds fields of its own.

    Attributes:
      corpus: a folder that a script under data/ made.
      out: the run directory; the same command continues what it finds there.
    """

    model: ModelConfig
    training: Training
    corpus: Path
    out: Path

    def __post_init__(self):
        if self.training.length > self.model.max_length:
            raise ConfigError(
                f"training.length is {self.training.length} and model.max_length is {self.model.max_length}; raise it "
                "or cut the rows"
            )


def train_and_score(
    config: Experiment,
    build: Callable[[nnx.Rngs], Decoder],
    objective: Objective | TeacherObjective,
    wrap: Wrap | None = None,
    *,
    part: data.Part | None = None,
    initial: Callable[[], Decoder] | None = None,
    source: Path | None = None,
    extra_flops: float = 0.0,
    evaluated_rows: int | None = None,
    script: Path | None = None,
    rules: ShardingRules = DEFAULT_RULES,
    sinks: Sequence[MetricSink] = (),
) -> tuple[Decoder, Scorecard]:
    """Trains on the corpus, or continues; evaluates on its validation split; leaves ``scorecard.json`` in the run.

    Where the corpus has no validation split, the quality in the scorecard is not measured, and a warning says so. What
    compares models or chose one of them takes their quality from other rows afterwards: see ``reported``.

    Of several processes (``sharding.hosts``) each feeds its part of the batches, and the first one writes.

    Args:
      config: of the run.
      build, objective, wrap, initial: see ``fit``.
      source: the run that ``initial`` makes its model from, whose tokenizer must be that of the corpus.
      part: what is read of the corpus, and what its teacher says of it. None: all of it, and no teacher.
      evaluated_rows: of the validation split. None: all.
      script: see ``Run``.
      rules: see ``fit``.
      extra_flops: that the objective spends on a token beside the model: further exits, a teacher.
      sinks: see ``fit``.

    Raises:
      EfftrainError: what ``fit``, ``Run`` and ``data`` refuse.
    """
    hosts.connect()
    training = config.training
    with hosts.together():
        corpus = data.open(config.corpus)
        corpus.check_model(config.model.vocab_size)
        begun = has_begun(config.out)
        if not begun:  # it goes on without the run that it started from
            check_start(training, config.model, config.corpus)
            if source is not None:
                check_tokenizer(source, config.corpus)
    loader = data.LoaderConfig(
        corpora=(part or data.Part(path=config.corpus),),
        length=training.length,
        batch_size=training.batch_size,
        seed=training.seed,
    )
    data.show_mixture(loader, training.tokens)
    held_out = choosing(config.corpus, training.length, evaluated_rows)
    mine = batch_part(training, rules)
    evaluate = _evaluator(corpus, held_out, training.batch_size, mine)

    flops_per_token = training_flops(abstract_decoder(config.model), training.length, steps=training.steps)
    flops_per_token += extra_flops
    batches = data.batches(loader, *mine, verify=False)
    run = _open(config, script)  # writes: after all that may be refused
    if hosts.process_index() == 0 and not (begun and (run.path / TOKENIZER).exists()):
        # What its tokens mean, for whoever uses the model without the corpus.
        shutil.copyfile(config.corpus / TOKENIZER, run.path / TOKENIZER)
    fitted = fit(
        build,
        objective,
        batches,
        training,
        run,
        wrap=wrap,
        initial=initial,
        evaluate=evaluate,
        flops_per_token=flops_per_token,
        rules=rules,
        sinks=sinks,
    )
    card = score(
        fitted.model,
        name=run.path.name,
        length=training.length,
        quality=fitted.evaluation,
        split=held_out.split,
        note=held_out.note,
        training_tokens=training.tokens,
        training_figures=fitted.figures,
        steps=training.steps,
        extra_flops=extra_flops,
        checkpoint=run.checkpoints / str(training.steps),
    )
    if hosts.process_index() == 0:
        card = _with_earlier(card, run.path / FILE_NAME)
        card.write(run.path / FILE_NAME)
    run.close()
    return fitted.model, card


def _evaluator(corpus: data.Corpus, rows: HeldOut, batch_size: int, part: tuple[int, int]) -> Evaluator | None:
    """None where the corpus has no such split. Other reasons to fail are found now, and not after the last step.

    Raises:
      ConfigError: the split is shorter than one row.
    """
    if rows.split not in corpus.splits:
        console.print(
            f"warning: corpus {corpus.path} has no split {rows.split!r}: the model is trained, but its quality is not "
            "measured",
            style="yellow",
            markup=False,
        )
        return None
    rows.batches(batch_size, part)
    return rows.evaluator(batch_size, part)


def reported(
    card: Scorecard, run: Path, corpus: Path, training: Training, *, rows: int | None = None, chosen: int = 0
) -> Scorecard:
    """The card of a finished run with the quality on rows that nothing was chosen on; the run keeps it.

    Args:
      card: of the run; where it has these figures already, nothing is measured.
      run: of which the newest checkpoint is read.
      corpus, rows, chosen: see ``held_out.reporting``.
      training: its length, batch size and mesh.
    """
    with hosts.together():
        held_out = reporting(corpus, training.length, rows, chosen=chosen, batch_size=training.batch_size)
    if (card.figures["bpb"].split, card.figures["bpb"].note) == (held_out.split, held_out.note):
        return card
    model = abstract_decoder(load_model_config(run))
    graph, abstract = nnx.split(model)
    mesh, places = make_mesh(training.mesh), checkpoint_directory(run, read_json(run / "config.json"))
    with use(mesh):
        sharded = with_shardings(abstract, state_shardings(abstract, mesh, DEFAULT_RULES))
        model = nnx.merge(graph, load_variables(places, sharded))
        quality = held_out.evaluator(training.batch_size, batch_part(training))(model)
    card = replace(card, figures=card.figures | quality_figures(quality, held_out.split, held_out.note))
    if hosts.process_index() == 0:
        card.write(run / FILE_NAME)
    return card


def finished(config: Experiment) -> Scorecard | None:
    """The scorecard of a run that is done; None where ``train_and_score`` has something to do.

    Raises:
      RunError: the directory holds a run of another configuration, of other inputs or, when finished, of other code.
    """
    hosts.connect()
    path = config.out / FILE_NAME
    if not hosts.from_first(path.exists):
        return None
    _open(config)
    return Scorecard.of(hosts.from_first(lambda: read_json(path)))


def _open(config: Experiment, script: Path | None = None) -> Run:
    with hosts.together():
        inputs = input_contents(config) if hosts.process_index() == 0 else {}  # the one that writes compares them
    return Run(config.out, config, script=script, inputs=inputs)


def _with_earlier(card: Scorecard, path: Path) -> Scorecard:
    """With the figures that others added to the card of this finished run."""
    return replace(card, figures=Scorecard.read(path).figures | card.figures) if path.exists() else card
