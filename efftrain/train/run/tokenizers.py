"""Whether the tokens of a corpus mean to a model what they meant where it was trained."""

from pathlib import Path

from efftrain.data.storage.shards import file_digest
from efftrain.data.storage.tokenizer import first_difference, load_tokenizer
from efftrain.errors import ConfigError
from efftrain.train.run.directory import read_json

FILE_NAME = "tokenizer.json"  # in a corpus, and in a run as a copy of that of its corpus


def find_tokenizer(directory: Path) -> Path | None:
    """The tokenizer of a run: its own, or (of a run of an earlier version) that of the corpus that it names."""
    corpus = read_json(directory / "config.json").get("corpus") or directory
    places = (Path(folder) / FILE_NAME for folder in (directory, corpus))
    return next((place for place in places if place.exists()), None)


def check_tokenizer(run: Path, corpus: Path) -> None:
    """Compares the tokenizer of a run with that of a corpus whose text its model is to read.

    Raises:
      ConfigError: they differ in content, or the run has none.
    """
    theirs = find_tokenizer(run)
    if theirs is None:
        raise ConfigError(
            f"{run} has no {FILE_NAME}, so its tokens may be others than those of {corpus}; copy that of the corpus "
            "it was trained on there"
        )
    check_same_tokenizer(theirs, corpus / FILE_NAME, run, corpus)


def check_same_tokenizer(theirs: Path, ours: Path, run: Path, other: Path) -> None:
    """Raises ConfigError where the file ``theirs`` of a run and ``ours`` of something else are different tokenizers."""
    if ours.is_file() and file_digest(ours) == file_digest(theirs):
        return
    found = first_difference(load_tokenizer(ours), load_tokenizer(theirs))
    if found is not None:
        raise ConfigError(
            f"the tokenizers of {other} and of the run {run} differ: {found}; the model of {run} reads no other, so "
            f"build a corpus with corpus.tokenizer {theirs}"
        )
