"""Builds a corpus: read and judge, deduplicate, split and shuffle, write text, train the tokenizer, write tokens.

Each stage reads what the one before it left on disk, so memory does not grow with the corpus. The shuffled order
makes the first megabytes of the training split a random sample; the tokenizer is trained on them.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from efftrain.config import to_json
from efftrain.data import corpus as corpora
from efftrain.data import store
from efftrain.data.corpus import Corpus, CorpusConfig
from efftrain.data.dedup import ExactDuplicates, text_digest
from efftrain.data.documents import Document, Skipped, Text
from efftrain.data.evidence import Evidence
from efftrain.data.funnel import Funnel
from efftrain.data.packing import write_tokens
from efftrain.data.rules import flatten, judge
from efftrain.data.shards import ShardWriter, text_features, token_features, write_metadata
from efftrain.data.sources import PythonFiles, TextFolder
from efftrain.data.splits import N_BUCKETS, SPLITS, assign_buckets, bucket
from efftrain.data.spool import ExternalSort, Spool, pack_document, stable_hash, unpack_record
from efftrain.data.tokenizer import load_tokenizer, token_dtype, tokenizer_json, train_tokenizer
from efftrain.progress import Progress, console, track

DUPLICATE = "exact_duplicate"
_DESCRIPTION = "Built by efftrain; see manifest.json beside this folder."


def build(config: CorpusConfig, out: Path | str, *, overwrite: bool = False) -> Corpus:
    """Builds the corpus, or finds that it is there already.

    Args:
      config: what it is made of.
      out: the folder, which is complete or not there; until then it is called ``out.incomplete``.
      overwrite: build in any case and replace the corpus that is there, once the new one is whole.

    Raises:
      CorpusError: ``out`` holds something else, a source is missing or empty, nothing is left, the disk is full.
    """
    out, started = Path(out), time.monotonic()
    inputs = [store.fingerprint(type(source).__name__, source.files()) for source in config.sources]
    if config.tokenizer:
        load_tokenizer(config.tokenizer)  # before the work, not after it
        inputs.append(store.fingerprint("the tokenizer", iter([("tokenizer.json", config.tokenizer)])))
    wanted = {"parameters": to_json(config), "inputs": inputs}
    if store.is_built(out, wanted, overwrite=overwrite):
        corpus = corpora.open(out)
        console.print(f"{out} is up to date: same inputs and parameters; nothing to do", markup=False)
        return corpus
    with store.building(out) as folder:
        one_document_a_file = all(isinstance(source, PythonFiles | TextFolder) for source in config.sources)
        n_bytes = sum(item["bytes"] for item in inputs) if one_document_a_file else None
        content = _build_in(folder, config, n_bytes)
        store.write_manifest(folder, {**wanted, **content, "seconds": round(time.monotonic() - started, 1)})
    return corpora.open(out, verify=False)  # its checksums were computed a moment ago


def _build_in(folder: Path, config: CorpusConfig, n_bytes: int | None) -> dict:
    work = folder / "work"
    evidence = Evidence(folder / "removed.parquet")
    funnel = Funnel()
    spool, duplicates = Spool(work / "spool"), ExactDuplicates(work / "digests")
    with Progress("Reading documents", n_bytes and n_bytes / 1e6, unit="MB") as progress:
        for text, document in _judged(config, evidence, funnel, progress):
            order = stable_hash(document.id, f"order {config.seed}")
            group = stable_hash(document.package, f"split {config.split.seed}")
            spool.add(pack_document(document, text.utf8), order=order, group=group)
            if config.deduplicate:
                duplicates.add(text_digest(document.text))
    spool.close()
    funnel.check_something_left(spool.n_documents)
    survivors = duplicates.survivors() if config.deduplicate else np.arange(spool.n_documents)
    splits = _write_text(folder, config, spool, survivors, evidence, funnel)
    evidence.close()
    shutil.rmtree(work)

    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        tokenizer = train_tokenizer(_sample(folder / "text", config.tokenizer_sample), config.vocabulary)
    (folder / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    token_shards = {}
    for split, figures in splits.items():
        texts = (document.text for document in corpora.read_documents(folder / "text", split))
        progress = track(texts, f"Tokenizing {split}", figures["documents"], unit="documents")
        figures["tokens"], token_shards[split] = write_tokens(
            folder / "tokens", split, tokenizer, progress, block=config.block, shard_bytes=config.shard_bytes
        )
    size = tokenizer.get_vocab_size()
    features = token_features(config.block, token_dtype(size))
    write_metadata(folder / "tokens", "tokens", features, token_shards, _DESCRIPTION)
    return {
        "funnel": funnel.rows(),
        "splits": splits,
        "tokenizer": {"vocabulary": size, "dtype": np.dtype(token_dtype(size)).name},
        "block": config.block,
    }


def _judged(
    config: CorpusConfig, evidence: Evidence, funnel: Funnel, progress: Progress
) -> Iterator[tuple[Text, Document]]:
    """The documents that every rule keeps; the others become evidence."""
    pending = 0
    for source in config.sources:
        for item in source.documents():
            kept = item if isinstance(item, Skipped) else _encodable(item)
            n_bytes = kept.n_bytes if isinstance(kept, Skipped) else len(kept[0].utf8)
            funnel.see(n_bytes)
            pending += n_bytes
            if pending > 1e6:
                progress.advance(pending / 1e6)
                pending = 0
            if isinstance(kept, Skipped):
                funnel.drop(kept.rule, n_bytes)
                evidence.add(id=kept.id, source=kept.source, rule=kept.rule, n_bytes=n_bytes, text=kept.detail)
                continue
            text, document = kept
            if (verdict := judge(tuple(flatten(config.rules)), text).verdict) is None:
                yield text, document
                continue
            funnel.drop(verdict.rule, n_bytes)
            evidence.add(
                id=document.id,
                source=document.source,
                rule=verdict.rule,
                score=verdict.score,
                n_bytes=n_bytes,
                text=document.text,
            )
    progress.advance(pending / 1e6)


def _encodable(document: Document) -> tuple[Text, Document] | Skipped:
    text = Text(document.text)
    try:
        _ = text.utf8
    except UnicodeEncodeError as error:  # JSON and some codecs can spell half a surrogate pair
        return Skipped(document.id, document.source, "undecodable", str(error), text.n_chars)
    return text, document


def _write_text(
    folder: Path,
    config: CorpusConfig,
    spool: Spool,
    survivors: np.ndarray,
    evidence: Evidence,
    funnel: Funnel,
) -> dict[str, dict[str, int]]:
    """Splits and shuffles the survivors and writes the text dataset."""
    index = spool.index()
    sizes = np.zeros(N_BUCKETS, np.int64)
    for start in range(0, len(index), 1 << 16):
        piece, numbers = index[start : start + (1 << 16)], np.arange(start, min(start + (1 << 16), len(index)))
        alive = piece[survivors[start : start + (1 << 16)] == numbers]
        np.add.at(sizes, bucket(alive["group"]), alive["size"].astype(np.int64))
    split_of = assign_buckets(config.split, sizes)

    sorts = {split: ExternalSort(folder / "work" / split) for split in SPLITS}
    counts = Counter()
    reader = spool.reader()
    for number, record in enumerate(track(spool.records(), "Shuffling", spool.n_documents, unit="documents")):
        if (survivor := int(survivors[number])) == number:
            split = SPLITS[split_of[int(index["group"][number]) >> 48]]
            sorts[split].add(int(index["order"][number]), record)
            counts[split] += 1
        else:
            id, source, _, utf8 = unpack_record(record)
            funnel.drop(DUPLICATE, len(utf8))
            evidence.add(
                id=id,
                source=source,
                rule=DUPLICATE,
                n_bytes=len(utf8),
                text=utf8.decode(),
                score=1.0,
                survivor=unpack_record(reader[survivor])[0],
            )
    reader.close()
    return _write_splits(folder / "text", config, {s: sorts[s] for s in SPLITS if counts[s]}, counts)


def _write_splits(
    folder: Path, config: CorpusConfig, sorts: dict[str, ExternalSort], counts: Counter
) -> dict[str, dict[str, int]]:
    features = text_features()
    shards, splits = {}, {}
    for split, records in sorts.items():
        writer = ShardWriter(folder, "text", split, shard_bytes=config.shard_bytes)
        n_bytes = 0
        for record in track(records, f"Writing {split}", counts[split], unit="documents"):
            id, source, meta, utf8 = unpack_record(record)
            writer.write(features.serialize_example({"text": utf8, "id": id, "source": source, "meta": meta}))
            n_bytes += len(utf8)
        shards[split] = writer.finish()
        splits[split] = {"documents": counts[split], "bytes": n_bytes, "tokens": 0}
    write_metadata(folder, "text", features, shards, _DESCRIPTION)
    return splits


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
