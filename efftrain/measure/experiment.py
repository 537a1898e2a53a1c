"""What recipes share: one run on a corpus from its batches to its scorecard."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

from efftrain import data
from efftrain.measure.evaluate import Evaluator
from efftrain.measure.flops import training_flops
from efftrain.measure.parameters import abstract_decoder
from efftrain.measure.score import score
from efftrain.measure.scorecard import FILE_NAME, Scorecard
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.sharding import hosts
from efftrain.train.inputs import input_contents
from efftrain.train.loop import Training, batch_part, fit
from efftrain.train.metric_sink import MetricSink
from efftrain.train.objective import Objective
from efftrain.train.program import Wrap
from efftrain.train.run import Run, read_json
from efftrain.train.teacher import Taught

TOKENIZER = "tokenizer.json"


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


def train_and_score(
    config: Experiment,
    build: Callable[[nnx.Rngs], Decoder],
    objective: Objective | Taught,
    wrap: Wrap | None = None,
    *,
    part: data.Part | None = None,
    initial: Callable[[], Decoder] | None = None,
    extra_flops: float = 0.0,
    evaluated_rows: int | None = None,
    script: Path | None = None,
    sinks: Sequence[MetricSink] = (),
) -> tuple[Decoder, Scorecard]:
    """Trains on the corpus, or continues; evaluates on its validation split; leaves ``scorecard.json`` in the run.

    Of several processes (``sharding.hosts``) each feeds its part of the batches, and the first one writes.

    Args:
      config: of the run.
      build, objective, wrap, initial: see ``fit``.
      part: what is read of the corpus, and what its teacher says of it. None: all of it, and no teacher.
      evaluated_rows: of the validation split. None: all.
      script: see ``Run``.
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
    run = _open(config, script)
    if hosts.process_index() == 0 and not (run.path / TOKENIZER).exists():
        # What its tokens mean, for whoever uses the model without the corpus.
        shutil.copyfile(config.corpus / TOKENIZER, run.path / TOKENIZER)

    loader = data.LoaderConfig(
        corpora=(part or data.Part(path=config.corpus),),
        length=training.length,
        batch_size=training.batch_size,
        seed=training.seed,
    )
    data.show_mixture(loader, training.tokens)
    whole = (data.Part(path=config.corpus),)
    held_out = replace(loader, corpora=whole, split="validation", shuffle=False, repeat=False)
    mine = batch_part(training)

    flops_per_token = training_flops(abstract_decoder(config.model), training.length, steps=training.steps)
    flops_per_token += extra_flops
    max_batches = None if evaluated_rows is None else -(-evaluated_rows // training.batch_size)
    fitted = fit(
        build,
        objective,
        data.batches(loader, *mine, verify=False),
        training,
        run,
        wrap=wrap,
        initial=initial,
        evaluate=Evaluator(
            lambda: data.batches(held_out, *mine, verify=False), corpus.token_bytes(), max_batches=max_batches
        ),
        flops_per_token=flops_per_token,
        sinks=sinks,
    )
    card = score(
        fitted.model,
        name=run.path.name,
        length=training.length,
        quality=fitted.evaluation,
        training_tokens=training.tokens,
        training_figures=fitted.figures,
        steps=training.steps,
        extra_flops=extra_flops,
        checkpoint=run.checkpoints / str(training.steps),
    )
    if hosts.process_index() == 0:
        card = _with_earlier(card, run.path / FILE_NAME)
        card.write(run.path / FILE_NAME)
    return fitted.model, card


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
