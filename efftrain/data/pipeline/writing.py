"""Provides the last stage of a build: writes the text of the splits, the tokenizer, and the tokens of the text.

Each part is written once; a resumed build writes only the missing parts.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.data import corpus as corpora
from efftrain.data.corpus import CorpusConfig
from efftrain.data.splits import SPLITS
from efftrain.data.stages.removals import Survivors
from efftrain.data.stages.spool import ExternalSort, unpack_record
from efftrain.data.stages.stage import read_summary, write_summary
from efftrain.data.storage.packing import write_tokens
from efftrain.data.storage.shards import (
    Serializer,
    Shard,
    ShardWriter,
    text_features,
    token_features,
    write_metadata,
)
from efftrain.data.storage.token_bytes import describe_tokenizer
from efftrain.data.storage.tokenizer import (
    load_tokenizer,
    marked_end_of_text,
    token_dtype,
    tokenizer_json,
    train_tokenizer,
    vocabulary_size,
)
from efftrain.progress import Progress, track

_DESCRIPTION = "Built by efftrain; see manifest.json beside this folder."


def write_corpus(
    folder: Path, config: CorpusConfig, left: Survivors, split_of: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes text, tokenizer and tokens, as far as the unfinished folder lacks them, and deletes intermediate files.

    Args:
      folder: the unfinished folder.
      config: the configuration of the corpus.
      left: the documents that have not been removed.
      split_of: (documents,) the index in SPLITS of each document.

    Returns:
      The entries of the manifest for the splits and for the tokenizer.
    """
    work = folder / "work"
    splits = _once(work / "text.json", lambda: _write_text(folder, config, left, split_of))
    tokenizer = _tokenizer(folder, config)
    shards, cut = {}, []
    for split, figures in splits.items():
        path = work / f"tokens-{split}.json"
        written = _once(path, lambda s=split, n=figures: _write_tokens(folder, config, s, n))
        figures["tokens"], shards[split] = written["tokens"], [Shard(**shard) for shard in written["shards"]]
        cut += written["cut"]
    features = token_features(config.block, token_dtype(vocabulary_size(tokenizer)))
    write_metadata(folder / "tokens", "tokens", features, shards, _DESCRIPTION)
    shutil.rmtree(work)
    texts = (document.text for document in corpora.read_documents(folder / "text", "train"))
    described = describe_tokenizer(tokenizer, marked_end_of_text(folder / "tokenizer.json"), texts)
    return splits, described | {"cut_documents": len(cut), "first_cut": cut[0] if cut else None}


def _write_text(folder: Path, config: CorpusConfig, left: Survivors, split_of: np.ndarray) -> dict[str, dict[str, int]]:
    """Shuffles the survivors of each split and writes the text dataset."""
    for name in ("work/sort", "text", "tokens"):
        shutil.rmtree(folder / name, ignore_errors=True)
    counts = np.bincount(split_of[left.alive], minlength=len(SPLITS))
    features = text_features()
    serialize = Serializer(features)
    shards, splits = {}, {}
    with contextlib.ExitStack() as stack:
        place = folder / "work" / "sort"
        sorts = {
            split: stack.enter_context(ExternalSort(place / split))
            for split, count in zip(SPLITS, counts, strict=True)
            if count
        }
        order = left.kept.column("order")
        with Progress("Shuffling", float(counts.sum()), unit="documents") as progress:
            for piece in range(left.kept.n_pieces):
                for number, record in left.kept.records(left.alive, piece):
                    sorts[SPLITS[split_of[number]]].add(int(order[number]), record)
                    progress.advance()
        for split, in_order in sorts.items():
            writer = ShardWriter(folder / "text", "text", split, shard_bytes=config.shard_bytes)
            count, n_bytes = int(counts[SPLITS.index(split)]), 0
            for record in track(in_order, f"Writing {split}", count, unit="documents"):
                id, source, meta, utf8 = unpack_record(record)
                writer.write(serialize({"text": utf8, "id": id, "source": source, "meta": meta}))
                n_bytes += len(utf8)
            shards[split] = writer.finish()
            splits[split] = {"documents": count, "bytes": n_bytes, "tokens": 0}
    write_metadata(folder / "text", "text", features, shards, _DESCRIPTION)
    return splits


def _tokenizer(folder: Path, config: CorpusConfig) -> Any:
    path = folder / "tokenizer.json"
    if not path.exists():
        end_of_text = config.end_of_text
        if config.tokenizer:
            tokenizer = load_tokenizer(config.tokenizer, end_of_text)
            end_of_text = end_of_text or marked_end_of_text(config.tokenizer)
        else:
            tokenizer = train_tokenizer(_sample(folder / "text", config.tokenizer_sample), config.vocabulary)
        partial = path.with_suffix(".partial")
        partial.write_text(tokenizer_json(tokenizer, end_of_text), encoding="utf-8")
        partial.rename(path)
    return load_tokenizer(path)


def _sample(folder: Path, n_bytes: int) -> Iterable[str]:
    """Yields the first documents of the training split with about ``n_bytes`` in total; the last one is shortened."""
    with Progress("Training the tokenizer: sample", n_bytes / 1e6, unit="MB") as progress:
        left = n_bytes
        for document in corpora.read_documents(folder, "train"):
            size = len(document.text.encode())
            yield document.text if size <= left else document.text[:left]
            progress.advance(min(size, left) / 1e6)
            left -= size
            if left <= 0:
                return


def _write_tokens(folder: Path, config: CorpusConfig, split: str, figures: dict[str, int]) -> dict[str, Any]:
    for path in (folder / "tokens").glob(f"tokens-{split}.*"):
        path.unlink()
    documents = corpora.read_documents(folder / "text", split)
    written = write_tokens(
        folder,
        split,
        _tokenizer(folder, config),
        track(documents, f"Tokenizing {split}", figures["documents"], unit="documents"),
        end_of_text=marked_end_of_text(folder / "tokenizer.json"),
        block=config.block,
        shard_bytes=config.shard_bytes,
    )
    return dataclasses.asdict(written)


def _once(path: Path, step: Callable[[], Any]) -> Any:
    """Returns the result of a step, from a file if an interrupted build has already performed it."""
    if (found := read_summary(path)) is None:
        write_summary(path, step())
        found = read_summary(path)
    return found
