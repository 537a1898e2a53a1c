"""Builds a corpus in stages: read and judge, deduplicate, split, decontaminate, write text, tokenize.

Each stage writes files to the unfinished folder, so that an interrupted build continues where it stopped. The result
depends only on the inputs, the configuration and the code, not on the engine or the number of its workers.
"""

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.code_identity import code_identity
from efftrain.config import to_json
from efftrain.data import corpus as corpora
from efftrain.data.corpus import Corpus, CorpusConfig
from efftrain.data.decontamination.stages import CONTAMINATED, decontaminate
from efftrain.data.dedup.exact_duplicates import EXACT_DUPLICATE, remove_exact_duplicates
from efftrain.data.dedup.lines import REPEATED, deduplicate_lines
from efftrain.data.dedup.near_duplicates import NEAR_DUPLICATE, remove_near_duplicates
from efftrain.data.pipeline.reading import EDITED, EMPTY, FAILED, OnError, Read, list_pieces, source_labels
from efftrain.data.pipeline.rule_scores import score_names
from efftrain.data.pipeline.writing import write_corpus
from efftrain.data.report.alerts import alarms
from efftrain.data.rules import Edit, Rule, RuleSet, flatten, is_edit, prefers_high, scoring
from efftrain.data.splits import N_BUCKETS, assign_buckets, bucket
from efftrain.data.stages.engines import Local
from efftrain.data.stages.exclusion_log import join_tables
from efftrain.data.stages.kept_documents import KeptDocuments, Reader
from efftrain.data.stages.removals import Survivors
from efftrain.data.stages.spool import unpack_record
from efftrain.data.stages.stage import Engine, read_summary, run_stage, stem
from efftrain.data.storage import store
from efftrain.data.storage.inputs import fingerprints, without_status
from efftrain.data.storage.tokenizer import load_tokenizer
from efftrain.errors import ConfigError, CorpusError, Interrupted
from efftrain.progress import console

SCORES = "scores.parquet"
ROOMS = ("data", "config")  # parts of the package whose code determines the content of a corpus
ALARMS = 10  # largest number of alarms on the terminal


def build(
    config: CorpusConfig,
    out: Path | str,
    *,
    overwrite: bool = False,
    engine: Engine | None = None,
    max_unreadable: int = 0,
    on_error: OnError = "stop",
) -> Corpus:
    """Builds a corpus and opens it. If ``out`` already contains it, it is only opened.

    Args:
      config: the configuration of the corpus.
      out: the folder of the corpus. It is named ``out.incomplete`` until it is complete.
      overwrite: build in any case, and replace an existing corpus when the new one is complete. The scores of the
        existing corpus are reused if only thresholds have changed.
      engine: runs the work. None: on the cores of this machine. A given engine is not closed, so that it can be used
        for several builds.
      max_unreadable: number of files that may be unreadable, wholly or in part. They are read again whenever the build
        is resumed, and the finished corpus has an alarm.
      on_error: what happens if a rule or a source raises an exception: "stop" ends the build and names the document;
        "skip" drops the document, or the rest of the piece if a source raised. A document that a rule could not judge
        is counted under ``failed/RULE`` and listed in ``removed.parquet``.

    Raises:
      CorpusError: ``out`` contains something else; a source is missing, empty or unreadable; a rule raises; no document
        is left; or the disk is full.
      ConfigError: the configuration is invalid.
      InUseError: another process is building this corpus.
    """
    out, started = Path(out), time.monotonic()
    if on_error not in ("stop", "skip"):
        raise ConfigError(f"on_error is {on_error!r}; choose stop or skip")
    _check_rules(config)
    named = [(type(source).__name__, source.files()) for source in config.sources]
    if config.tokenizer:
        load_tokenizer(config.tokenizer, config.end_of_text)  # raises before the work rather than after it
        named.append(("the tokenizer", iter([("tokenizer.json", config.tokenizer)])))
    inputs = fingerprints(named, store.known_inputs(out))
    wanted = {
        "parameters": to_json(config),
        "inputs": without_status(inputs),
        "code": code_identity(config, rooms=ROOMS),
    }
    if store.is_built(out, wanted, overwrite=overwrite):
        corpus = corpora.open(out)
        _check_readable(corpus.manifest.get("unreadable") or {}, max_unreadable, f"{out} was built without")
        console.print(f"{out} is up to date: same inputs, parameters and code; nothing to do", markup=False)
        return corpus
    own = engine is None
    engine = engine or Local()
    try:
        with store.building(out, wanted, inputs) as folder:
            build = _Build(folder, config, engine, max_unreadable, on_error)
            content = build.run(_scores_to_reuse(out, config, wanted))
            content["seconds"] = round(time.monotonic() - started, 1)
            manifest = store.write_manifest(folder, {**wanted, "inputs": inputs, **content})
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"interrupted; the completed parts are kept in {store.unfinished_path(out)}, and the same command "
            "continues from there"
        ) from stop
    finally:
        if own:
            engine.close()
    found = alarms(manifest)
    for sentence in found[:ALARMS]:
        console.print(f"warning: {sentence}", style="yellow", markup=False)
    if len(found) > ALARMS:
        more = f"warning: {len(found) - ALARMS} more warnings are in the report: efftrain corpus report {out}"
        console.print(more, style="yellow", markup=False)
    return corpora.open(out, verify=False)  # the checksums have just been computed


@dataclasses.dataclass(frozen=True)
class _Build:
    """One build: the sequence of its stages."""

    folder: Path
    config: CorpusConfig
    engine: Engine
    max_unreadable: int
    on_error: OnError

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def run(self, scores: tuple[Path, tuple[int, ...]] | None) -> dict[str, Any]:
        """Runs all stages; returns the entries of the manifest that describe the result."""
        config, work, engine = self.config, self.work, self.engine
        within_source = config.within == "source"
        pieces = list_pieces(config.sources)
        summaries = self._read(pieces, scores)
        kept = KeptDocuments(work / "read", [summary["kept"] for summary in summaries])
        left = Survivors(kept, summaries)
        left.statistics.total().check_something_left(len(kept), _score_names(config))
        if config.deduplicate:
            remove_exact_duplicates(engine, work, left, within_source=within_source)
        _check_ids(left)
        near = lines = contaminated = None
        if config.near_duplicates:
            near = remove_near_duplicates(engine, work, left, config.near_duplicates, within_source=within_source)
        if config.line_deduplication:  # after near duplicates, which are recognised by the lines that they share
            lines = deduplicate_lines(engine, work, left, config.line_deduplication, within_source=within_source)
        split_of, split_by = _assign_splits(config, left)
        if config.decontaminate:
            contaminated = decontaminate(engine, work, left, split_of, config.decontaminate)
        if not (left.alive & (split_of == 0)).any():
            raise CorpusError(
                "no document is left to train on after decontamination; raise decontaminate.threshold, or check the "
                "contents of the evaluation sets"
            )
        join_tables(left.exclusion_logs, self.folder / "removed.parquet")
        parts = [kept.folder / f"{stem(number)}.scores.parquet" for number in range(len(pieces))]
        join_tables(parts, self.folder / SCORES)
        splits, tokenizer = write_corpus(self.folder, config, left, split_of)
        order = _stage_names(config, contaminated)
        return {
            "funnel": left.statistics.total().rows(order),
            "sources": left.statistics.rows(order),
            "unreadable": _unreadable(summaries),
            "near_duplicates": near,
            "repeated_lines": lines,
            "decontamination": contaminated,
            "split_by": split_by,
            "splits": splits,
            "scoring": scoring(_rules(config)),
            "pieces": [summary["scored"] for summary in summaries],
            "tokenizer": tokenizer,
            "block": config.block,
        }

    def _read(
        self, pieces: tuple[tuple[int, Any], ...], scores: tuple[Path, tuple[int, ...]] | None
    ) -> list[dict[str, Any]]:
        config = self.config
        read = Read(
            sources=config.sources,
            pieces=pieces,
            rules=_rules(config),
            labels=source_labels(config.sources),
            qualify=len(config.sources) > 1,
            seed=config.seed,
            split_seed=config.split.seed,
            quality=_quality(config),
            on_error=self.on_error,
            scores=scores,
        )
        self._forget_unreadable(len(pieces))
        summaries = run_stage(self.engine, self.work, "read", read, len(pieces), "Reading and filtering")
        _check_readable(_unreadable(summaries), self.max_unreadable, "the sources have")
        return summaries

    def _forget_unreadable(self, n_pieces: int) -> None:
        """Deletes the results of pieces with unreadable files and of all later stages, so that they run again."""
        paths = [self.work / "read" / f"{stem(number)}.json" for number in range(n_pieces)]
        summaries = {path: read_summary(path) for path in paths}
        again = [path for path, summary in summaries.items() if summary and summary["unreadable"]["files"]]
        if not again:
            return
        for later in self.work.iterdir():
            if later.is_file():
                later.unlink()
            elif later.name != "read":
                shutil.rmtree(later)
        for path in again:
            path.unlink()


def _unreadable(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the number of files that could not be read, wholly or in part, and the messages for the first ones."""
    found = [summary["unreadable"] for summary in summaries]
    return {"files": sum(f["files"] for f in found), "first": [line for f in found for line in f["first"]][:20]}


def _check_readable(unreadable: Mapping[str, Any], max_files: int, what: str) -> None:
    n_files = unreadable.get("files", 0)
    if n_files > max_files:
        raise CorpusError(
            f"{what} {n_files} file{'s' * (n_files > 1)} that could not be read to the end, such as "
            f"{unreadable['first'][0]}; repair or remove {'them' if n_files > 1 else 'it'} and run the same command "
            f"again (with --overwrite if the corpus exists), or allow the loss with max_unreadable={n_files} "
            f"(--max-unreadable {n_files})"
        )


def _check_ids(left: Survivors) -> None:
    """Raises CorpusError if two documents have the same id."""
    hashes = left.kept.column("order")
    numbers = np.flatnonzero(left.alive)
    numbers = numbers[np.argsort(hashes[numbers], kind="stable")]
    same = np.flatnonzero(hashes[numbers][1:] == hashes[numbers][:-1])
    with Reader(left.kept) as reader:
        for row in same.tolist():
            (id, source, *_), (other, other_source, *_) = (
                unpack_record(reader.record(int(number))) for number in numbers[row : row + 2]
            )
            if id == other:  # equal hashes may also be a collision
                raise CorpusError(
                    f"{len(same)} documents have the id of another document, such as {id!r} (in {source} and in "
                    f"{other_source}); choose an id field with unique values, or none, so that a document is named "
                    "after its position in its file"
                )


def _assign_splits(config: CorpusConfig, left: Survivors) -> tuple[np.ndarray, str]:
    """Assigns a split to each document, including removed ones.

    Returns:
      (documents,) int8, the index in SPLITS of each document; and the unit that is assigned as a whole: "group", or
      "document" if there are too few groups to fill all splits.
    """
    n_bytes = np.where(left.alive, left.kept.column("n_bytes"), 0)
    groups, split_by = bucket(left.kept.column("group")), "group"
    if np.count_nonzero(np.bincount(groups, n_bytes, N_BUCKETS)) < config.split.n_splits:
        groups, split_by = bucket(left.kept.column("order")), "document"
    return assign_buckets(config.split, np.bincount(groups, n_bytes, N_BUCKETS))[groups], split_by


def _rules(config: CorpusConfig) -> tuple[Rule | RuleSet | Edit, ...]:
    assert config.rules is not None  # ``CorpusConfig`` puts the default rules in the place of None
    return config.rules


def _score_names(config: CorpusConfig) -> list[str]:
    return score_names(list(flatten(_rules(config))))


def _stage_names(config: CorpusConfig, contaminated: Mapping[str, Any] | None) -> list[str]:
    """Returns the names of all stages and rules that remove documents, in the order in which they apply."""
    names = _score_names(config)
    failed = [f"{FAILED}/{rule.name}" for rule in flatten(_rules(config))]
    stages = [*failed, *names, EDITED, EMPTY, EXACT_DUPLICATE, NEAR_DUPLICATE, REPEATED]
    return stages + [f"{CONTAMINATED}/{name}" for name in contaminated or ()]


def _quality(config: CorpusConfig) -> tuple[str, int] | None:
    """Returns the rule that decides which of two duplicates is kept, with 1 if high scores are better and -1 if low.

    Raises ConfigError if the rule prefers neither.
    """
    for rule in flatten(_rules(config)):
        if config.quality is not None and rule.name == config.quality and not is_edit(rule):
            return rule.name, 1 if prefers_high(rule) else -1
    return None


def _check_rules(config: CorpusConfig) -> None:
    names = _score_names(config)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"corpus.rules has {repeated[0]!r} twice; keep one, or give the other a name of its own")
    if config.quality is not None and config.quality not in names:
        raise ConfigError(f"corpus.quality is {config.quality!r}, which is not one of the rules: {', '.join(names)}")
    _quality(config)


def _scores_to_reuse(out: Path, config: CorpusConfig, wanted: Mapping[str, Any]) -> tuple[Path, tuple[int, ...]] | None:
    """Returns the scores of the corpus to be replaced and the first row of each piece, if only thresholds differ."""
    if not (out / SCORES).is_file():
        return None
    manifest = store.read_manifest(out)
    same = without_status(manifest["inputs"]) == wanted["inputs"] and manifest.get("code") == wanted["code"]
    if not same or manifest["scoring"] != scoring(_rules(config)) or (manifest.get("unreadable") or {}).get("files"):
        return None
    store.check_files(out, manifest | {"files": {SCORES: manifest["files"][SCORES]}}, contents=True)
    console.print(f"reusing the scores in {out / SCORES}, because only thresholds differ", markup=False)
    return out / SCORES, tuple(np.concatenate([[0], np.cumsum(manifest["pieces"])])[:-1].tolist())
