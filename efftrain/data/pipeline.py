"""Builds a corpus in stages: read and judge, deduplicate, split, decontaminate, write text, tokenize.

Each stage leaves files in the unfinished folder. Interrupted, the same command goes on where it stopped. What is kept
depends on the inputs and the configuration alone, not on the engine or the number of its workers.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.config import to_json
from efftrain.data import corpus as corpora
from efftrain.data import store
from efftrain.data.canary import check_recall
from efftrain.data.contamination import CONTAMINATED, decontaminate
from efftrain.data.corpus import Corpus, CorpusConfig
from efftrain.data.engines import Local
from efftrain.data.evidence import join_tables
from efftrain.data.exact_duplicates import EXACT_DUPLICATE, remove_exact_duplicates
from efftrain.data.minhash import MinHash
from efftrain.data.near_duplicates import NEAR_DUPLICATE, remove_near_duplicates
from efftrain.data.packing import write_tokens
from efftrain.data.reading import EDITED, EMPTY, Kept, Read, list_pieces
from efftrain.data.removals import Survivors, alive_records
from efftrain.data.repeated_lines import REPEATED, remove_repeated_lines
from efftrain.data.rules import flatten, is_edit, scoring
from efftrain.data.shards import Serializer, Shard, ShardWriter, text_features, token_features, write_metadata
from efftrain.data.splits import N_BUCKETS, SPLITS, assign_buckets, bucket
from efftrain.data.spool import ExternalSort, unpack_record
from efftrain.data.stages import Engine, read_json, run_stage, stem, write_json
from efftrain.data.token_bytes import describe_tokenizer
from efftrain.data.tokenizer import (
    load_tokenizer,
    marked_end_of_text,
    token_dtype,
    tokenizer_json,
    train_tokenizer,
    vocabulary_size,
)
from efftrain.errors import ConfigError
from efftrain.progress import Progress, console, track

SCORES = "scores.parquet"
_DESCRIPTION = "Built by efftrain; see manifest.json beside this folder."


def build(config: CorpusConfig, out: Path | str, *, overwrite: bool = False, engine: Engine | None = None) -> Corpus:
    """Builds the corpus, or finds that it is there already.

    Args:
      config: what it is made of.
      out: the folder, which is complete or not there; until then it is called ``out.incomplete``.
      overwrite: build in any case and replace the corpus that is there, once the new one is whole. Where only
        thresholds changed, its scores are used again.
      engine: where the work is done, by default on the cores of this machine.

    Raises:
      CorpusError: ``out`` holds something else, a source is missing or empty, nothing is left, the disk is full.
    """
    out, started = Path(out), time.monotonic()
    _check_rules(config)
    inputs = [store.fingerprint(type(source).__name__, source.files()) for source in config.sources]
    if config.tokenizer:
        load_tokenizer(config.tokenizer, config.end_of_text)  # before the work, not after it
        inputs.append(store.fingerprint("the tokenizer", iter([("tokenizer.json", config.tokenizer)])))
    wanted = {"parameters": to_json(config), "inputs": inputs}
    if store.is_built(out, wanted, overwrite=overwrite):
        corpus = corpora.open(out)
        console.print(f"{out} is up to date: same inputs and parameters; nothing to do", markup=False)
        return corpus
    with store.building(out, wanted) as folder, contextlib.closing(engine or Local()) as engine:
        content = _build_in(folder, config, engine, _scores_to_reuse(out, config, inputs))
        content["seconds"] = round(time.monotonic() - started, 1)
        store.write_manifest(folder, {**wanted, **content})
    return corpora.open(out, verify=False)  # its checksums were computed a moment ago


def _build_in(
    folder: Path, config: CorpusConfig, engine: Engine, scores: tuple[Path, tuple[int, ...]] | None
) -> dict[str, Any]:
    """Runs all stages; returns what the manifest says of the corpus."""
    work = folder / "work"
    pieces = list_pieces(config.sources)
    read = Read(
        sources=config.sources,
        pieces=pieces,
        rules=config.rules,
        seed=config.seed,
        split_seed=config.split.seed,
        quality=config.quality,
        scores=scores,
    )
    summaries = run_stage(engine, work, "read", read, len(pieces), "Reading and judging")
    kept = Kept(work / "read", [summary["kept"] for summary in summaries])
    left = Survivors(kept, summaries)
    left.funnels.total().check_something_left(len(kept))
    if config.deduplicate:
        remove_exact_duplicates(engine, work, left)
    lines = remove_repeated_lines(engine, work, left, config.repeated_lines) if config.repeated_lines else None
    near = _remove_near_duplicates(engine, work, left, config.near_duplicates) if config.near_duplicates else None
    split_of = _assign_splits(config, left)
    contaminated = decontaminate(engine, work, left, split_of, config.decontaminate) if config.decontaminate else None

    join_tables(left.evidence, folder / "removed.parquet")
    join_tables([kept.folder / f"{stem(number)}.scores.parquet" for number in range(len(pieces))], folder / SCORES)
    splits = _once(work / "text.json", lambda: _write_text(folder, config, left, split_of))
    tokenizer = _tokenizer(folder, config)
    shards, cut = {}, []
    for split, figures in splits.items():
        written = _once(work / f"tokens-{split}.json", lambda s=split, n=figures: _write_tokens(folder, config, s, n))
        figures["tokens"], shards[split] = written["tokens"], [Shard(**shard) for shard in written["shards"]]
        cut += written["cut"]
    size = vocabulary_size(tokenizer)
    write_metadata(folder / "tokens", "tokens", token_features(config.block, token_dtype(size)), shards, _DESCRIPTION)
    shutil.rmtree(work)
    order = [*_score_names(config), EDITED, EMPTY, EXACT_DUPLICATE, REPEATED, NEAR_DUPLICATE]
    order += [f"{CONTAMINATED}/{name}" for name in contaminated or ()]
    return {
        "funnel": left.funnels.total().rows(order),
        "sources": left.funnels.rows(order),
        "repeated_lines": lines,
        "near_duplicates": near,
        "decontamination": contaminated,
        "splits": splits,
        "scoring": scoring(config.rules),
        "pieces": [summary["scored"] for summary in summaries],
        "tokenizer": _describe_tokenizer(folder, cut),
        "block": config.block,
    }


def _remove_near_duplicates(engine: Engine, work: Path, left: Survivors, config: MinHash) -> dict[str, Any]:
    alive = left.alive.copy()
    signed, figures = remove_near_duplicates(engine, work, left, config)
    figures |= check_recall(left.kept, alive, signed, config)
    canary = figures["canary"]
    if canary["found"] < 0.9 * canary["planted"]:
        console.print(
            f"warning: of {canary['planted']} planted duplicates only {canary['found']} were found; some near "
            "duplicates are left: use more bands of fewer rows",
            style="yellow",
            markup=False,
        )
    return figures


def _assign_splits(config: CorpusConfig, left: Survivors) -> np.ndarray:
    """(documents,) int8, the index in SPLITS of each document, whether it is still there or not."""
    groups = bucket(left.kept.column("group"))
    sizes = np.bincount(groups, np.where(left.alive, left.kept.column("n_bytes"), 0), N_BUCKETS)
    return assign_buckets(config.split, sizes)[groups]


def _write_text(folder: Path, config: CorpusConfig, left: Survivors, split_of: np.ndarray) -> dict[str, dict[str, int]]:
    """Shuffles the survivors of each split and writes the text dataset."""
    for name in ("work/sort", "text", "tokens"):
        shutil.rmtree(folder / name, ignore_errors=True)
    counts = np.bincount(split_of[left.alive], minlength=len(SPLITS))
    sorts = {split: ExternalSort(folder / "work" / "sort" / split) for split in SPLITS}
    order = left.kept.column("order")
    with Progress("Shuffling", float(counts.sum()), unit="documents") as progress:
        for piece in range(left.kept.n_pieces):
            for number, record in alive_records(left.kept, left.alive, piece):
                sorts[SPLITS[split_of[number]]].add(int(order[number]), record)
                progress.advance()
    features = text_features()
    serialize = Serializer(features)
    shards, splits = {}, {}
    for split, count in zip(SPLITS, counts.tolist(), strict=True):
        if not count:
            continue
        writer = ShardWriter(folder / "text", "text", split, shard_bytes=config.shard_bytes)
        n_bytes = 0
        for record in track(sorts[split], f"Writing {split}", count, unit="documents"):
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
    """The first documents of the training split, the last one cut, so that they have about ``n_bytes``."""
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


def _describe_tokenizer(folder: Path, cut: list[str]) -> dict[str, Any]:
    """What the manifest says of the tokenizer; ``cut``: documents that were encoded in parts, see ``Written``."""
    path = folder / "tokenizer.json"
    texts = (document.text for document in corpora.read_documents(folder / "text", "train"))
    described = describe_tokenizer(load_tokenizer(path), marked_end_of_text(path), texts)
    if cut:
        console.print(
            f"warning: {len(cut)} documents, {cut[0]} first, are long and have no space to cut them at; they were "
            "tokenized in parts, and have other tokens at the cuts than as a whole",
            style="yellow",
            markup=False,
        )
    return described | {"cut_documents": len(cut)}


def _once(path: Path, step: Callable[[], Any]) -> Any:
    """The result of a step, from the file where an interrupted build has done it already."""
    if not path.exists():
        write_json(path, step())
    return read_json(path)


def _score_names(config: CorpusConfig) -> list[str]:
    return [rule.name for rule in flatten(config.rules) if not is_edit(rule)]


def _check_rules(config: CorpusConfig) -> None:
    names = _score_names(config)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"corpus.rules has {repeated[0]!r} twice; keep one, or give the other a name of its own")
    if config.quality is not None and config.quality not in names:
        raise ConfigError(f"corpus.quality is {config.quality!r}, which is not one of the rules: {', '.join(names)}")


def _scores_to_reuse(out: Path, config: CorpusConfig, inputs: list) -> tuple[Path, tuple[int, ...]] | None:
    """The scores of the corpus that is about to be replaced, where only thresholds differ."""
    if not (out / SCORES).is_file():
        return None
    manifest = store.read_manifest(out)
    if manifest["inputs"] != inputs or manifest["scoring"] != scoring(config.rules):
        return None
    store.check_files(out, manifest | {"files": {SCORES: manifest["files"][SCORES]}}, contents=True)
    console.print(f"using the scores in {out / SCORES} again: only thresholds differ", markup=False)
    return out / SCORES, tuple(np.concatenate([[0], np.cumsum(manifest["pieces"])])[:-1].tolist())
