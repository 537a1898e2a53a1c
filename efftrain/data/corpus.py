"""A corpus on disk: its configuration, its documents and its tokens."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.table import Table

from efftrain.config import digest
from efftrain.data.decontamination.decontaminate import Decontaminate
from efftrain.data.dedup.lines import LineDeduplication
from efftrain.data.dedup.minhash import MinHash
from efftrain.data.documents import Document
from efftrain.data.rules import Edit, Rule, RuleSet, default_rules
from efftrain.data.sources.base import Source
from efftrain.data.splits import SplitByPackage
from efftrain.data.stages.filter_statistics import funnel_table
from efftrain.data.storage.packing import bytes_path
from efftrain.data.storage.store import check_files, read_manifest
from efftrain.data.storage.token_bytes import byte_level_lengths
from efftrain.data.storage.tokenizer import END_OF_TEXT, check_vocabulary, load_tokenizer
from efftrain.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_READ_ROWS, _READ_BYTES = 256, 8 << 20


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What a corpus is made of. Two equal configurations on equal inputs give byte-identical shards.

    Attributes:
      sources: read one after the other; of equal documents the first is kept.
      rules: applied in this order; a document is counted under the first that rejects it. By default those that suit
        the ``kind`` of the sources, see ``rules.default_rules``.
      within: what a document is compared with where duplicates of any kind are removed: the whole corpus, or only its
        own source.
      deduplicate: remove exact repeats of normalised text; the first is kept.
      repeated_lines: keep lines that documents share in one of them; None keeps them everywhere.
      near_duplicates: find documents whose shingles are nearly the same, verify and remove them; None keeps them.
      decontaminate: keep held-out splits apart from training, and training from evaluation sets; None does neither.
      quality: name of the rule by whose score the best of near duplicates is kept: the highest of a rule that asks for
        at least a score, the lowest of one that allows at most one.
      vocabulary: entries of the tokenizer that is trained.
      tokenizer: a ``tokenizer.json`` of the ``tokenizers`` library to use, of any kind; corpora are mixed only if they
        have the same. None: a byte-level BPE is trained.
      end_of_text: the token of ``tokenizer`` that stands before each document. None: the one that its file marks, or
        the first of ``tokenizer.KNOWN_ENDS_OF_TEXT`` that it has, such as ``<|endoftext|>`` and ``</s>``.
      tokenizer_sample: bytes of training text that the tokenizer is trained on. They are held in memory while it
        trains.
      split: which documents go to train, validation and test.
      seed: of the order of the documents.
      block: tokens per record of the token store.
      shard_bytes: size from which a new shard is begun.
    """

    sources: tuple[Source, ...]
    rules: tuple[Rule | RuleSet | Edit, ...] | None = None
    within: Literal["corpus", "source"] = "corpus"
    deduplicate: bool = True
    repeated_lines: LineDeduplication | None = None
    near_duplicates: MinHash | None = None
    decontaminate: Decontaminate | None = field(default_factory=Decontaminate)
    quality: str | None = None
    vocabulary: int = 4096
    tokenizer: Path | None = None
    end_of_text: str | None = None
    tokenizer_sample: int = 32 << 20
    split: SplitByPackage = field(default_factory=SplitByPackage)
    seed: int = 0
    block: int = 8192
    shard_bytes: int = 64 << 20

    def __post_init__(self):
        if not self.sources:
            raise ConfigError("corpus.sources is empty; give at least one source")
        if self.rules is None:
            rules = default_rules(getattr(source, "kind", "text") for source in self.sources)
            object.__setattr__(self, "rules", rules)
        if self.within not in ("corpus", "source"):
            raise ConfigError(f"corpus.within is {self.within!r}; choose corpus or source")
        check_vocabulary(self.vocabulary)
        if self.end_of_text is not None and self.tokenizer is None:
            raise ConfigError(
                f"corpus.end_of_text is {self.end_of_text!r} and corpus.tokenizer is None; a tokenizer that is trained "
                f"has {END_OF_TEXT}, so leave it None, or give the tokenizer that has this token"
            )
        for name in ("tokenizer_sample", "block", "shard_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"corpus.{name} is {getattr(self, name)}; it must be at least 1")


def open(path: Path | str, *, verify: bool = True) -> "Corpus":
    """Opens a corpus and checks it.

    Args:
      path: the folder.
      verify: compare the checksum of every file (about 1 GB/s per core). Sizes are compared in any case; pass False
        where another process has just verified the same files.

    Raises:
      CorpusError: there is no corpus, or a file is missing, truncated or altered; the message names it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_files(path, manifest, contents=verify)
    return Corpus(path, manifest)


class Corpus:
    """An opened corpus. Reading is thread-safe; nothing is held in memory but the tokenizer."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]):
        self.path, self.manifest = path, manifest

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        return load_tokenizer(self.path / "tokenizer.json", self.end_of_text)

    def tokenizer(self) -> "Tokenizer":
        return self._tokenizer

    @property
    def end_of_text(self) -> str:
        """The token before each document."""
        return self.manifest["tokenizer"].get("end_of_text", END_OF_TEXT)

    @property
    def end_of_text_id(self) -> int:
        return self.manifest["tokenizer"].get("end_of_text_id", 0)  # a corpus of an earlier version does not say it

    def token_bytes(self, split: str = "validation") -> np.ndarray:
        """(vocabulary,): the bytes of text that each token stands for, for bits per byte; 0 for special tokens.

        int32 where the tokenizer is byte-level, the same for all splits. Else float64, the mean over ``split``: its
        tokens together have exactly the bytes of its documents in UTF-8.

        Raises:
          CorpusError: the corpus was built by an earlier version, which did not count the bytes of such a tokenizer.
        """
        lengths = byte_level_lengths(self._tokenizer)
        if lengths is not None:
            return lengths
        self._split(split)
        path = bytes_path(self.path, split)
        if not path.is_file():
            raise CorpusError(
                f"{self.path} has a tokenizer that is not byte-level, and no {path.name} with the bytes of its tokens; "
                "build the corpus again"
            )
        return np.load(path)

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocabulary"]

    @property
    def funnel(self) -> list[dict[str, Any]]:
        """Rows of ``stage``, ``documents`` and ``bytes``: seen, dropped by each rule, kept."""
        return self.manifest["funnel"]

    @property
    def splits(self) -> dict[str, dict[str, int]]:
        """split -> documents, bytes and tokens."""
        return self.manifest["splits"]

    @property
    def token_fingerprint(self) -> str:
        """Stands for the token streams of all splits, wherever the folder lies."""
        return digest({k: v for k, v in self.manifest["files"].items() if k.startswith("tokens/")})

    def n_tokens(self, split: str) -> int:
        return self._split(split)["tokens"]

    def tokens(self, split: str) -> "TokenStream":
        """The split as one stream of tokens, ``end_of_text`` before every document."""
        self._split(split)
        return TokenStream(_data_source(self.path / "tokens", split), self.n_tokens(split), self.manifest["block"])

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split, in the order of its tokens."""
        self._split(split)
        yield from read_documents(self.path / "text", split)

    def check_model(self, vocab_size: int) -> None:
        """Raises ConfigError where a model with ``vocab_size`` entries cannot read this corpus."""
        if vocab_size < self.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {vocab_size} and the tokenizer of {self.path} has {self.vocab_size} entries; "
                f"use at least {self.vocab_size}"
            )

    def table(self) -> Table:
        """The funnel and the splits, for the terminal."""
        return funnel_table(f"corpus {self.path}", self.funnel, self.splits)

    def _split(self, split: str) -> dict[str, int]:
        if split not in self.splits:
            raise ConfigError(f"corpus {self.path} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]


class TokenStream:
    """A stream of tokens on disk; ``tokens[start:stop]`` reads the blocks that the range touches."""

    def __init__(self, blocks: Any, n_tokens: int, block: int):
        self._blocks, self._n_tokens, self._block = blocks, n_tokens, block

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, key: slice) -> np.ndarray:
        """(tokens,) int32. Like any sequence, a range over the end is cut off; the step must be 1."""
        start, stop, step = key.indices(self._n_tokens)
        if step != 1:
            raise ValueError("tokens are read in ranges with step 1")
        if stop <= start:
            return np.empty(0, np.int32)
        first, last = start // self._block, (stop - 1) // self._block
        parts = [self._blocks[number]["tokens"] for number in range(first, last + 1)]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined[start - first * self._block : stop - first * self._block].astype(np.int32)


def read_documents(folder: Path, split: str) -> Iterator[Document]:
    """Streams the documents of a text dataset that ``shards.text_features`` describes."""
    rows = _data_source(folder, split)
    start, n_rows = 0, 1
    while start < len(rows):
        found = rows.__getitems__(list(range(start, min(start + n_rows, len(rows)))))
        for row in found:
            yield Document(row["id"].decode(), row["text"].decode(), row["source"].decode(), json.loads(row["meta"]))
        start += len(found)
        # Many rows at once are faster, and many long documents at once do not fit into memory.
        n_bytes = sum(len(row["text"]) for row in found) // len(found)
        n_rows = max(1, min(2 * n_rows, _READ_ROWS, _READ_BYTES // max(n_bytes, 1)))


def _data_source(folder: Path, split: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder).as_data_source(split)
    except (OSError, KeyError, ValueError) as error:
        raise CorpusError(f"{folder} cannot be read ({error}); build the corpus again") from error
