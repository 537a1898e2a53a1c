"""Provides the first stage of a build: reads the pieces of the sources, and edits, judges and keeps or drops documents.

Each item of the stage is a piece. It writes the files of ``kept_documents.KeptDocuments`` and

  NNNNNN.scores.parquet   the scores of every document that could be decoded
  NNNNNN.removed.parquet  the evidence of the documents that were dropped
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from efftrain.data.dedup.exact import text_digest
from efftrain.data.documents import UNREADABLE, Document, Skipped, Text
from efftrain.data.pipeline.rule_scores import Known, RuleScores, read_scores, score_names
from efftrain.data.rules import Edit, Judgement, Rule, RuleFailed, RuleSet, flatten, judge
from efftrain.data.sources.base import Piece, Source
from efftrain.data.stages.exclusion_log import ExclusionLog, clean
from efftrain.data.stages.filter_statistics import FilterStatistics, example
from efftrain.data.stages.kept_documents import INDEX, index_entry
from efftrain.data.stages.spool import pack_document
from efftrain.data.stages.stage import stem
from efftrain.errors import CorpusError, EfftrainError

EDITED, EMPTY, UNDECODABLE, FAILED = "edited", "empty", "undecodable", "failed"
_LISTED = 20  # largest number of unreadable files that a summary lists

OnError = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class Read:
    """Task: reads piece ``number``.

    Attributes:
      sources: the sources of the corpus.
      pieces: (index of the source, piece) for each piece.
      rules: the rules and edits of the corpus.
      labels: for each source the name under which its documents are counted; None keeps the name from the source.
      qualify: prefix each id with the name of the source, because there are several sources.
      seed, split_seed: seeds of the order of the documents and of the choice of groups.
      quality: the rule whose score decides which of two duplicates is kept, and a factor of 1 or -1 with which higher
        is better. None: no rule.
      on_error: what happens if a rule or a source raises: "stop" ends the build, "skip" drops the document or the rest
        of the piece.
      scores: a table of scores from an earlier build of the same inputs, and the row at which each piece begins. None:
        the scores are computed.
    """

    sources: tuple[Source, ...]
    pieces: tuple[tuple[int, Piece], ...]
    rules: tuple[Rule | RuleSet | Edit, ...]
    labels: tuple[str | None, ...]
    qualify: bool
    seed: int
    split_seed: int
    quality: tuple[str, int] | None
    on_error: OnError
    scores: tuple[Path, tuple[int, ...]] | None = None

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        rules = tuple(flatten(self.rules))
        known = self._known_scores(number, rules)
        with _Output(folder / stem(number), self, rules) as output:
            for item in self._items(number):
                if isinstance(item, Skipped):
                    output.skip(item)
                    continue
                text = _encodable(item)
                if isinstance(text, Skipped):
                    output.skip(text)
                    continue
                scores = next(known)[clean(item.id)] if known else None
                try:
                    found = judge(rules, text, scores)
                except RuleFailed as error:
                    if self.on_error == "stop":
                        raise CorpusError(
                            f"{error.rule!r} failed on the document {item.id} of {item.source}: {error}; fix the "
                            "rule, or drop such documents with on_error='skip' (--on-error skip)"
                        ) from error
                    output.fail(item, text, error)
                else:
                    output.judged(item, text, found)
        return output.summary()

    def _items(self, number: int) -> Iterator[Document | Skipped]:
        """Yields the items of a piece with labels applied; reports an exception of the source with its position."""
        place, piece = self.pieces[number]
        source, label = self.sources[place], self.labels[place]
        last = None
        try:
            for item in source.documents(piece):
                if label is not None:
                    item = dataclasses.replace(item, source=label)
                if self.qualify:
                    item = dataclasses.replace(item, id=f"{item.source}:{item.id}")
                yield item
                last = item.id
        except GeneratorExit:
            raise
        except EfftrainError:
            raise
        except Exception as error:
            where = (
                f"after {last}" if last else f"at the beginning of {piece.files[0][0] if piece.files else 'its piece'}"
            )
            detail = f"{type(source).__name__} raised {describe_error(error)} {where}"
            if self.on_error == "stop":
                raise CorpusError(
                    f"{detail}; fix the source, or continue without the rest of its piece with on_error='skip' "
                    "(--on-error skip)"
                ) from error
            yield Skipped(last or f"piece {number}", label or type(source).__name__, UNREADABLE, detail)

    def _known_scores(self, number: int, rules: tuple[Rule | Edit, ...]) -> Iterator[Known] | None:
        if self.scores is None:
            return None
        path, starts = self.scores
        return read_scores(path, starts[number], score_names(rules))


class _Output:
    """Writes the files of one piece and counts documents for its summary."""

    def __init__(self, path: Path, task: Read, rules: Sequence[Rule | Edit]):
        self._path, self._task, self._rules = path, task, rules
        self._statistics = FilterStatistics()
        self._index: list[tuple] = []
        self._unreadable: Counter[str] = Counter()
        self._offset = 0

    def __enter__(self) -> "_Output":
        with contextlib.ExitStack() as files:
            self._records = files.enter_context(Path(f"{self._path}.records").open("wb"))
            self._log = ExclusionLog(Path(f"{self._path}.removed.parquet"))
            files.callback(self._log.close)
            self._scores = RuleScores(Path(f"{self._path}.scores.parquet"), self._rules)
            files.callback(self._scores.close)
            self._files = files.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def skip(self, item: Skipped) -> None:
        """Records an item that could not be read."""
        self._statistics.see(item.source, item.n_bytes)
        self._statistics.drop(item.source, item.rule, item.n_bytes, f"{item.id}: {item.detail}")
        self._log.add(id=item.id, source=item.source, rule=item.rule, n_bytes=item.n_bytes, text=item.detail)
        if item.rule == UNREADABLE:
            self._unreadable[clean(f"{item.id}: {item.detail}")] += 1

    def fail(self, document: Document, text: Text, error: RuleFailed) -> None:
        """Records a document for which a rule raised an exception."""
        rule, n_bytes = f"{FAILED}/{error.rule}", len(text.utf8)
        self._statistics.see(document.source, n_bytes)
        self._scores.add(document, n_bytes, None, rule)
        self._statistics.drop(document.source, rule, n_bytes, f"{document.id}: {error}")
        self._log.add(id=document.id, source=document.source, rule=rule, n_bytes=n_bytes, text=str(error))

    def judged(self, document: Document, original: Text, found: Judgement) -> None:
        """Records a document that the rules have judged, and keeps or drops it."""
        n_bytes, text = len(original.utf8), found.text
        self._statistics.see(document.source, n_bytes)
        rejected = found.verdict
        self._scores.add(document, n_bytes, found.scores, rejected.rule if rejected else None)
        if found.edited:
            self._statistics.cut(document.source, EDITED, n_bytes - len(text.utf8))
        if rejected is not None or not text.text or text.text.isspace():
            rule = rejected.rule if rejected else EMPTY
            self._statistics.drop(document.source, rule, len(text.utf8), example(document.id, text.text))
            self._log.add(
                id=document.id,
                source=document.source,
                rule=rule,
                score=rejected.score if rejected else 0.0,
                n_bytes=len(text.utf8),
                text=text.text,
            )
        else:
            self._keep(document, text, found.scores)

    def _keep(self, document: Document, text: Text, scores: dict[str, float]) -> None:
        task, record = self._task, pack_document(document, text.utf8)
        name, sign = task.quality or ("", 1)
        self._index.append(
            index_entry(
                document,
                text,
                text_digest(text.text),
                offset=self._offset,
                size=len(record),
                seed=task.seed,
                split_seed=task.split_seed,
                quality=sign * scores[name] if name else 0.0,
            )
        )
        self._records.write(record)
        self._offset += len(record)

    def summary(self) -> dict[str, Any]:
        """Returns the summary of the piece, after its files are closed. Pieces with ``unreadable`` files run again."""
        np.save(f"{self._path}.index.npy", np.array(self._index, INDEX))
        return {
            "kept": len(self._index),
            "scored": self._scores.n_rows,
            "sources": self._statistics.to_json(),
            "unreadable": {"files": self._unreadable.total(), "first": [*self._unreadable][:_LISTED]},
        }


def list_pieces(sources: Sequence[Source]) -> tuple[tuple[int, Piece], ...]:
    """Returns (index of the source, piece) for all pieces of all sources, in order.

    Raises:
      CorpusError: a source has no file.
    """
    pieces = tuple((number, piece) for number, source in enumerate(sources) for piece in source.pieces())
    if not pieces:
        raise CorpusError("the sources hold no document; check their paths and patterns")
    return pieces


def source_labels(sources: Sequence[Source]) -> tuple[str | None, ...]:
    """Returns distinct names for sources whose paths end alike: the shortest ends of their paths that differ.

    The entry is None for any other source, including those without a path; its documents keep the name that the source
    gives them.
    """
    paths = [getattr(source, "path", None) for source in sources]
    parts = [Path(path).absolute().parts if path is not None else None for path in paths]
    names = Counter(own[-1] for own in parts if own)
    labels = []
    for own in parts:
        if not own or names[own[-1]] == 1:
            labels.append(None)
            continue
        ends = (own[-n:] for n in range(1, len(own) + 1))
        unique = (end for end in ends if sum(other[-len(end) :] == end for other in parts if other) == 1)
        labels.append("/".join(next(unique, own)))
    return tuple(labels)


def describe_error(error: BaseException) -> str:
    """Returns the class of an exception and the last line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _encodable(document: Document) -> Text | Skipped:
    text = Text(document.text, document.id)
    try:
        _ = text.utf8
    except UnicodeEncodeError as error:  # JSON and some codecs allow unpaired surrogates
        return Skipped(document.id, document.source, UNDECODABLE, str(error), text.n_chars)
    return text
