"""One training run on a corpus, from its batches to its scorecard: the part that all recipes share."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from flax import nnx

from efftrain import data
from efftrain.errors import ConfigError
from efftrain.experiment.model_of_run import (
    LENGTH,
    MAX_LENGTH,
    OUT,
    known_length,
    read_model,
    run_of_model,
    with_own_settings,
)
from efftrain.interop.announce import announce_export
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.cost.objective_flops import objective_flops
from efftrain.measure.quality.evaluate import Evaluator
from efftrain.measure.quality.held_out import HeldOut, choosing, reporting
from efftrain.measure.scorecard.score import quality_figures, score
from efftrain.measure.scorecard.scorecard import FILE_NAME, Scorecard
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.progress import console
from efftrain.recipe import MODEL_OF
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
from efftrain.train.run.tokenizers import check_tokenizer, copy_tokenizer
from efftrain.train.start import check_start


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The fields that every recipe's configuration has; a recipe adds its own.

    Attributes:
      model: configuration of the model.
      training: configuration of the training.
      corpus: folder of a corpus, as a script under data/ writes it.
      out: run directory; if it holds an unfinished run, the same command continues it.
      start_flags: flags that name a run from whose parameters the training starts. A recipe with such a field of its
        own adds it.
    """

    model: ModelConfig
    training: Training
    corpus: Path
    out: Path
    start_flags: ClassVar[tuple[str, ...]] = ("training.finetune",)

    def __post_init__(self):
        if self.training.length > self.model.max_length:
            raise ConfigError(
                f"training.length is {self.training.length} and model.max_length is {self.model.max_length}; raise it "
                "or cut the rows"
            )

    def of_model(self, model: ModelConfig) -> Self:
        """Returns this configuration with the model of another run; a recipe adds its technique to that model.

        It must leave a model as it is to which the technique was added already.
        """
        return replace(self, model=with_own_settings(model, self.model))

    def for_flags(self, flags: Mapping[str, str]) -> Self:
        """Returns the configuration whose fields flags then change: with the model of the run that they name, if any.

        That run is the value of ``--model-of`` or of one of ``start_flags``. If the run from which a run has started
        is gone, the model is that of ``out``, so that the same command continues it.

        Args:
          flags: values of the flags of a command line by their names, such as "training.finetune".

        Raises:
          RunError: there is no such run.
          ConfigError: the run does not know what is needed for training, because it was imported, and no flag gives it.
        """
        run, starts = run_of_model(flags, self.start_flags), run_of_model(flags, ()) is None
        if run is None:
            return self
        if starts and not (run / "config.json").exists() and has_begun(out := Path(flags.get(OUT, self.out))):
            run, starts = out, False
        flag = f"--{MODEL_OF}" if not starts else next(f"--{name}" for name in self.start_flags if name in flags)
        model = read_model(run, sys.modules[type(self).__module__], flag=flag)
        length = known_length(run, flags) if starts else None
        # Flags that this configuration must fit already now, because a shorter model or longer rows would be refused.
        if (given := flags.get(LENGTH, "")).isdigit():
            length = int(given)
        if (given := flags.get(MAX_LENGTH, "")).isdigit():
            model = model.replace(max_length=int(given))
        training = self.training if length is None else replace(self.training, length=length)
        longest = max(training.length, self.model.max_length)  # a recipe may replace the fields one by one
        mine = replace(self, model=self.model.replace(max_length=longest), training=training)
        return mine.of_model(model)


def train_and_score(
    config: Experiment,
    build: Callable[[nnx.Rngs], Decoder],
    objective: Objective | TeacherObjective,
    wrap: Wrap | None = None,
    *,
    part: data.Part | None = None,
    initial: Callable[[], Decoder] | None = None,
    source: Path | None = None,
    extra_flops: float | None = None,
    evaluated_rows: int | None = None,
    script: Path | None = None,
    rules: ShardingRules = DEFAULT_RULES,
    sinks: Sequence[MetricSink] = (),
) -> tuple[Decoder, Scorecard]:
    """Trains a model on a corpus, evaluates it on the validation split and writes ``scorecard.json`` into the run.

    An unfinished run is continued. If the corpus has no validation split, a warning is printed and the scorecard has no
    quality. Code that compares models, or that chose one by this quality, must report the quality on other rows; see
    ``reported``.

    A new run says first as what its model can be exported (``interop.announce``).

    With several processes (``sharding.hosts``), each process feeds its part of the batches, and the first one writes.

    Args:
      config: configuration of the run.
      build, objective, wrap, initial: see ``fit``.
      source: the run whose model ``initial`` starts from; its tokenizer must be that of the corpus.
      part: which part of the corpus is read, and the teacher's predictions for it. None: all of it, without a teacher.
      evaluated_rows: number of rows of the validation split. None: all.
      script: see ``Run``.
      rules: see ``fit``.
      extra_flops: FLOPs per token that the objective spends in addition to the model, for example on a teacher. None:
        those of ``objective_flops``.
      sinks: see ``fit``.

    Returns:
      The trained model and its scorecard.

    Raises:
      EfftrainError: see ``fit``, ``Run`` and ``data``.
    """
    hosts.connect()
    training = config.training
    with hosts.together():
        corpus = data.open(config.corpus)
        corpus.check_model(config.model.vocab_size)
        begun = has_begun(config.out)
        if not begun:  # a run that has begun no longer needs the run that it started from
            check_start(training, config.model, config.corpus)
            if source is not None:
                check_tokenizer(source, config.corpus)
            announce_export(config.model)
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

    if extra_flops is None:
        extra_flops = objective_flops(objective, config.model, training)
    flops_per_token = training_flops(abstract_decoder(config.model), training.length, steps=training.steps)
    flops_per_token += extra_flops
    batches = data.batches(loader, *mine, verify=False)
    run = _open(config, script)  # writes files, so that everything that may raise an error comes before
    if hosts.process_index() == 0 and not (begun and (run.path / TOKENIZER).exists()):
        # A copy of the tokenizer, to use the model without the corpus.
        shutil.copyfile(config.corpus / TOKENIZER, run.path / TOKENIZER)
        if (origin := source or training.started_from) is not None:
            copy_tokenizer(origin, run.path)
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
    """The evaluator of the rows; None, with a warning, if the corpus has no such split.

    It reads the split at once, so that other errors appear before the training and not after it.

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
    """Adds to a finished run's scorecard the quality on rows on which nothing was chosen, and writes it into the run.

    Args:
      card: scorecard of the run; if it has the quality on these rows already, nothing is measured.
      run: run directory, whose newest checkpoint is read.
      corpus, rows, chosen: see ``held_out.reporting``.
      training: gives the length, the batch size and the mesh of the evaluation.

    Returns:
      The scorecard with the new quality.

    Raises:
      ConfigError: the run was trained with another tokenizer than that of the corpus.
    """
    with hosts.together():
        if hosts.process_index() == 0:
            check_tokenizer(run, corpus)
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
    """The scorecard of a finished run; None if ``train_and_score`` still has to run.

    Raises:
      RunError: the directory holds a run with another configuration or other inputs, or a finished run of other code.
    """
    hosts.connect()
    path = config.out / FILE_NAME
    if not hosts.from_first(path.exists):
        return None
    _open(config)
    return Scorecard.of(hosts.from_first(lambda: read_json(path)))


def _open(config: Experiment, script: Path | None = None) -> Run:
    with hosts.together():
        inputs = input_contents(config) if hosts.process_index() == 0 else {}  # only the writer compares them
    return Run(config.out, config, script=script, inputs=inputs)


def _with_earlier(card: Scorecard, path: Path) -> Scorecard:
    """The scorecard with the figures that were added to an earlier scorecard of the same run."""
    return replace(card, figures=Scorecard.read(path).figures | card.figures) if path.exists() else card
