"""What the files of a run, and of the runs that it was made from, say for a model card."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efftrain.data.storage.store import MANIFEST
from efftrain.interop.import_model import FILE_NAME as IMPORT
from efftrain.measure.scorecard.scorecard import FILE_NAME as SCORECARD
from efftrain.measure.scorecard.scorecard import Scorecard
from efftrain.models.config import ModelConfig
from efftrain.train.inputs import content
from efftrain.train.metrics.metrics_log import FILE_NAME as METRICS
from efftrain.train.metrics.metrics_log import Row, read_metrics
from efftrain.train.run.directory import load_model_config, read_json
from efftrain.train.run.identity import FILE_NAME as IDENTITY

COMPRESSION = "compression.json"
# Fields of configurations that name the run whose model a run starts from.
STARTS = ("source", "upcycle", "convert")


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """A corpus that a run names.

    Attributes:
      name: name of its folder.
      manifest: its manifest. None: ``missing`` says why.
      missing: why its figures are not known, as the end of a sentence; empty if they are.
    """

    name: str
    manifest: Mapping[str, Any] | None
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the files of one run say; a file that the run lacks is None, or has no rows.

    Attributes:
      name: name of its directory.
      settings: content of ``config.json``.
      environment: content of ``environment.json``.
      imported: content of ``import.json``, of a model that another project made.
      compression: content of ``compression.json``.
      scorecard: its scorecard.
      steps: rows of the metrics of the training split.
      evaluations: rows of the metrics of the validation split.
      corpus: the corpus that it was trained or compressed on.
      made_from: name of the run whose model it was made from.
      before: that run. None: there is none, or it is not at its recorded place any more.
    """

    name: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    imported: Mapping[str, Any] | None
    compression: Mapping[str, Any] | None
    scorecard: Scorecard | None
    steps: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    corpus: CorpusFacts | None
    made_from: str | None
    before: "RunFacts | None"

    @property
    def training(self) -> Mapping[str, Any]:
        """The training configuration; empty for an imported model."""
        return self.settings.get("training") or {}

    @property
    def trained(self) -> bool:
        """Whether this run made training steps itself."""
        return bool(self.steps)

    def chain(self) -> Iterator["RunFacts"]:
        """Yields the run, the run that it was made from, and so on to the first one."""
        facts: RunFacts | None = self
        while facts is not None:
            yield facts
            facts = facts.before


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """A run and its model.

    Attributes:
      run: what its files say.
      model: configuration of the model.
    """

    run: RunFacts
    model: ModelConfig


def card_facts(run: Path) -> CardFacts:
    """Reads what a model card says of a run; no weights and no documents are read.

    Raises:
      RunError: the directory is not a run, or one of its files is not valid JSON.
    """
    return CardFacts(run=_run_facts(run, set()), model=load_model_config(run))


def _run_facts(run: Path, seen: set[Path]) -> RunFacts:
    settings, compression = _read(run / "config.json") or {}, _read(run / COMPRESSION)
    before = _made_from(settings, compression)
    known = before is not None and (before / "config.json").is_file() and before.resolve() not in seen | {run.resolve()}
    rows = (run / METRICS).is_file()
    return RunFacts(
        name=run.resolve().name,
        settings=settings,
        environment=_read(run / "environment.json") or {},
        imported=_read(run / IMPORT),
        compression=compression,
        scorecard=Scorecard.read(run / SCORECARD) if (run / SCORECARD).is_file() else None,
        steps=tuple(read_metrics(run)) if rows else (),
        evaluations=tuple(read_metrics(run, "validation")) if rows else (),
        corpus=_corpus(run, settings, compression),
        made_from=None if before is None else before.name,
        before=_run_facts(before, seen | {run.resolve()}) if known and before is not None else None,
    )


def _made_from(settings: Mapping[str, Any], compression: Mapping[str, Any] | None) -> Path | None:
    training = settings.get("training") or {}
    resumed = training.get("resume_from")
    names = [
        (compression or {}).get("run"),
        *(settings.get(name) for name in STARTS),
        settings.get("teacher") if settings.get("initial") in ("layers", "cut") else None,
        training.get("finetune"),
        resumed and resumed.rpartition("@")[0],
    ]
    return next((Path(name) for name in names if isinstance(name, str) and name), None)


def _corpus(run: Path, settings: Mapping[str, Any], compression: Mapping[str, Any] | None) -> CorpusFacts | None:
    inputs = (_read(run / IDENTITY) or {}).get("inputs") or {}
    named, digest = settings.get("corpus"), inputs.get("corpus")
    if compression is not None:
        named, digest = compression.get("corpus"), compression.get("text")
    if not isinstance(named, str) or not named:
        return None
    path = Path(named)
    if not (path / MANIFEST).is_file():
        return CorpusFacts(name=path.name, manifest=None, missing="it is not at its recorded place any more")
    if digest is not None and content(path) != digest:
        return CorpusFacts(name=path.name, manifest=None, missing="what is at its recorded place now is another one")
    return CorpusFacts(name=path.name, manifest=_read(path / MANIFEST))


def _read(path: Path) -> dict[str, Any] | None:
    value = read_json(path) if path.is_file() else None
    return value if isinstance(value, dict) else None
