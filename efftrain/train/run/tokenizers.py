"""Checks that a corpus was tokenised with the tokenizer of a run, so that its tokens mean the same to the model."""

import shutil
from pathlib import Path

from efftrain.data.storage.shards import file_digest
from efftrain.data.storage.tokenizer import first_difference, load_tokenizer
from efftrain.errors import ConfigError
from efftrain.train.run.directory import read_json

FILE_NAME = "tokenizer.json"  # in a corpus, and copied from it into each run
# With what an imported run says of its tokenizer: the chat template, and which tokens begin and end texts.
TOKENIZER_FILES = (FILE_NAME, "chat_template.jinja", "generation_config.json", "tokenizer_config.json")


def find_tokenizer(directory: Path) -> Path | None:
    """Returns the tokenizer file of a run: its own, or, for a run of an earlier version, that of its corpus."""
    corpus = read_json(directory / "config.json").get("corpus") or directory
    places = (Path(folder) / FILE_NAME for folder in (directory, corpus))
    return next((place for place in places if place.exists()), None)


def copy_tokenizer(source: Path, run: Path) -> None:
    """Copies the tokenizer of a run, and what its files say of it, into another run that does not have them yet."""
    for name in TOKENIZER_FILES:
        if (source / name).exists() and not (run / name).exists():
            shutil.copyfile(source / name, run / name)


def check_tokenizer(run: Path, corpus: Path) -> None:
    """Compares the tokenizer of a run with that of a corpus which its model is going to read.

    Raises:
      ConfigError: they differ in content, or the run has no tokenizer.
    """
    theirs = find_tokenizer(run)
    if theirs is None:
        raise ConfigError(
            f"{run} has no {FILE_NAME}, so its tokens may differ from those of {corpus}; copy that of the corpus it "
            "was trained on into the run"
        )
    check_same_tokenizer(theirs, corpus / FILE_NAME, run, corpus)


def check_same_tokenizer(theirs: Path, ours: Path, run: Path, other: Path) -> None:
    """Compares two tokenizer files.

    Args:
      theirs: file of the run.
      ours: file of something else, such as a corpus.
      run: the run, for the message.
      other: the owner of ``ours``, for the message.

    Raises:
      ConfigError: they are different tokenizers.
    """
    if ours.is_file() and file_digest(ours) == file_digest(theirs):
        return
    found = first_difference(load_tokenizer(ours), load_tokenizer(theirs))
    if found is not None:
        raise ConfigError(
            f"the tokenizers of {other} and of the run {run} differ: {found}; the model of {run} needs its own, so "
            f"build a corpus with corpus.tokenizer {theirs}"
        )
