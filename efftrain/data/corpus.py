"""Opens a corpus on disk and gives access to its documents, its tokens and its configuration."""

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
from efftrain.data.splits import SplitByGroup
from efftrain.data.stages.filter_statistics import filter_table
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
    """Configuration of a corpus: sources, rules, deduplication, tokenizer and splits.

    Two equal configurations on equal inputs give byte-identical shards.

    Attributes:
      sources: read one after the other; of several equal documents the first is kept.
      rules: applied in this order; a document is counted under the first rule that rejects it. None: the default rules
        for the ``kind`` of the sources, see ``rules.default_rules``.
      within: the scope of every kind of deduplication: documents are compared across the whole ``corpus``, or only
        with documents of the same ``source``.
      deduplicate: remove exact duplicates of the normalised text; the first is kept.
      line_deduplication: removal of lines or paragraphs that occur before, in another document or in the same one.
        None: no line is removed.
      near_duplicates: MinHash search for near duplicates, which are verified and removed. None: near duplicates are
        kept.
      decontaminate: removes from held-out splits what repeats the training split, and from the training split what
        repeats an evaluation set. None: neither is done.
      quality: name of the rule whose score decides which of several near duplicates is kept: the highest score for a
        rule with a minimum, the lowest for a rule with a maximum. Equal scores, and None: the longest document is kept.
      vocabulary: number of entries of the tokenizer that is trained; has no effect with ``tokenizer``.
      tokenizer: path of an existing ``tokenizer.json`` of the ``tokenizers`` library, of any kind. Only corpora with
        the same tokenizer can be mixed. None: a byte-level BPE is trained.
      end_of_text: the token of ``tokenizer`` that is placed before each document. None: the token that the file marks
        as such, or the first of ``tokenizer.KNOWN_ENDS_OF_TEXT`` that it has, such as ``<|endoftext|>`` and ``</s>``.
      tokenizer_sample: number of bytes of training text on which the tokenizer is trained. They are held in memory
        during the training.
      split: how documents are assigned to train, validation and test.
      seed: seed of the shuffled order of the documents.
      block: number of tokens per record of the token store.
      shard_bytes: size in bytes at which a new shard is begun.
    """

    sources: tuple[Source, ...]
    rules: tuple[Rule | RuleSet | Edit, ...] | None = None
    within: Literal["corpus", "source"] = "corpus"
    deduplicate: bool = True
    line_deduplication: LineDeduplication | None = None
    near_duplicates: MinHash | None = None
    decontaminate: Decontaminate | None = field(default_factory=Decontaminate)
    quality: str | None = None
    vocabulary: int = 4096
    tokenizer: Path | None = None
    end_of_text: str | None = None
    tokenizer_sample: int = 32 << 20
    split: SplitByGroup = field(default_factory=SplitByGroup)
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
                f"has {END_OF_TEXT}, so set end_of_text to None, or tokenizer to one that has this token"
            )
        for name in ("tokenizer_sample", "block", "shard_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"corpus.{name} is {getattr(self, name)}; it must be at least 1")


def open(path: Path | str, *, verify: bool = True) -> "Corpus":
    """Opens a corpus on disk and checks that its files are complete and unaltered.

    Args:
      path: the folder of the corpus.
      verify: compare the checksum of every file with the manifest, which reads the whole corpus. If False, only the
        sizes are compared; use it when another process has just verified the same files.

    Raises:
      CorpusError: there is no corpus, or a file is missing, truncated or altered; the message names the file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_files(path, manifest, contents=verify)
    return Corpus(path, manifest)


class Corpus:
    """An opened corpus: its documents, token streams, tokenizer and counts.

    Reading is thread-safe. Only the tokenizer is held in memory.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]):
        self.path, self.manifest = path, manifest

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        return load_tokenizer(self.path / "tokenizer.json", self.end_of_text)

    def tokenizer(self) -> "Tokenizer":
        """Returns the tokenizer of the corpus, which is loaded at the first call."""
        return self._tokenizer

    @property
    def end_of_text(self) -> str:
        """The token that is placed before each document."""
        return self.manifest["tokenizer"].get("end_of_text", END_OF_TEXT)

    @property
    def end_of_text_id(self) -> int:
        """The id of the token that is placed before each document."""
        return self.manifest["tokenizer"].get("end_of_text_id", 0)  # the manifests of earlier versions lack this key

    def token_bytes(self, split: str = "validation") -> np.ndarray:
        """Returns the number of bytes of text per token, which bits per byte are computed from.

        Args:
          split: the split over which the mean is taken; has no effect with a byte-level tokenizer.

        Returns:
          (vocabulary,): for a byte-level tokenizer int32, the same for all splits. Otherwise float64, the mean over
          ``split``, so that the tokens of the split together have exactly as many bytes as its documents in UTF-8.
          Special tokens have 0 bytes.

        Raises:
          CorpusError: the tokenizer is not byte-level, and the corpus was built by an earlier version, which did not
            count the bytes of such tokens.
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
        """The number of entries of the tokenizer, including special tokens."""
        return self.manifest["tokenizer"]["vocabulary"]

    @property
    def filter_statistics(self) -> list[dict[str, Any]]:
        """Rows of ``stage``, ``documents`` and ``bytes``: what was read, what each rule removed and what was kept."""
        return self.manifest["funnel"]

    @property
    def splits(self) -> dict[str, dict[str, int]]:
        """The numbers of ``documents``, ``bytes`` and ``tokens`` of each split, by the name of the split."""
        return self.manifest["splits"]

    @property
    def token_fingerprint(self) -> str:
        """Digest of the token streams of all splits. It does not depend on the path of the corpus."""
        return digest({k: v for k, v in self.manifest["files"].items() if k.startswith("tokens/")})

    def n_tokens(self, split: str) -> int:
        """Returns the number of tokens in a split."""
        return self._split(split)["tokens"]

    def tokens(self, split: str) -> "TokenStream":
        """Returns the split as one stream of tokens, with ``end_of_text`` before every document."""
        self._split(split)
        return TokenStream(_data_source(self.path / "tokens", split), self.n_tokens(split), self.manifest["block"])

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the documents of a split, in the order of its token stream."""
        self._split(split)
        yield from read_documents(self.path / "text", split)

    def check_model(self, vocab_size: int) -> None:
        """Raises ConfigError if a model with ``vocab_size`` entries is too small for the tokenizer of this corpus."""
        if vocab_size < self.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {vocab_size}, but the tokenizer of {self.path} has {self.vocab_size} entries; "
                f"give --model.vocab-size {self.vocab_size}, or build the corpus with a smaller vocabulary"
            )

    def table(self) -> Table:
        """Returns the filter statistics and the splits as a table for the terminal."""
        return filter_table(f"corpus {self.path}", self.filter_statistics, self.splits)

    def _split(self, split: str) -> dict[str, int]:
        if split not in self.splits:
            raise ConfigError(f"corpus {self.path} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]


class TokenStream:
    """A stream of tokens on disk. ``tokens[start:stop]`` reads only the blocks that the range touches."""

    def __init__(self, blocks: Any, n_tokens: int, block: int):
        self._blocks, self._n_tokens, self._block = blocks, n_tokens, block

    def __len__(self) -> int:
        return self._n_tokens

    def __getitem__(self, key: slice) -> np.ndarray:
        """Returns the tokens of a range, (tokens,) int32.

        A range that reaches past the end is shortened, as with any sequence; the step must be 1.
        """
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
    """Yields the documents of a split of a text dataset with the features of ``shards.text_features``."""
    rows = _data_source(folder, split)
    start, n_rows = 0, 1
    while start < len(rows):
        found = rows.__getitems__(list(range(start, min(start + n_rows, len(rows)))))
        for row in found:
            yield Document(row["id"].decode(), row["text"].decode(), row["source"].decode(), json.loads(row["meta"]))
        start += len(found)
        # Reading many rows at once is faster, but many long documents at once do not fit into memory.
        n_bytes = sum(len(row["text"]) for row in found) // len(found)
        n_rows = max(1, min(2 * n_rows, _READ_ROWS, _READ_BYTES // max(n_bytes, 1)))


def _data_source(folder: Path, split: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(folder)  # its decorated methods have lost their types
        return builder.as_data_source(split)
    except (OSError, KeyError, ValueError) as error:
        raise CorpusError(f"{folder} cannot be read ({error}); build the corpus again") from error
