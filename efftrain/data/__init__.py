"""Building corpora from raw text and reading them as batches for training.

    config = data.CorpusConfig(sources=(data.TextFolder(path=Path("essays"), pattern="*.txt"),))
    corpus = data.build(config, Path("corpora/essays"))     # a second call with the same inputs does nothing
    corpus = data.open("corpora/essays")                    # raises an error that names a damaged shard
    loader = data.LoaderConfig(corpora=(data.Part(path=corpus.path),), length=256, batch_size=16)
    for batch in data.batches(loader): ...

Heavy packages are imported lazily: TFDS, Grain, pyarrow and tokenizers are imported by the first call that needs them.
"""

import importlib

from efftrain.class_names import RENAMED

_HOMES = {
    "Corpus": "corpus",
    "CorpusConfig": "corpus",
    "open": "corpus",
    "build": "pipeline.build",
    "Document": "documents",
    "Skipped": "documents",
    "Verdict": "documents",
    "SplitByGroup": "splits",
    "Decontaminate": "decontamination.decontaminate",
    "EvaluationSet": "decontamination.decontaminate",
    "MinHash": "dedup.minhash",
    "LineDeduplication": "dedup.lines",
    "Local": "stages.engines",
    "Beam": "stages.engines",
    "JsonLines": "sources.json",
    "Parquet": "sources.parquet",
    "Arrow": "sources.arrow",
    "PythonFiles": "sources.text",
    "TextFolder": "sources.text",
    "AtBlankLines": "sources.cutting",
    "AtPattern": "sources.cutting",
    "HuggingFaceDataset": "sources.huggingface",
    "Piece": "sources.base",
    "FileSource": "sources.base",
    "Tfds": "sources.tfds",
    "Warc": "sources.warc.source",
    "Code": "rules",
    "Loader": "loading.loader",
    "LoaderConfig": "loading.loader",
    "PackedRows": "loading.loader",
    "Part": "loading.loader",
    "TeacherCache": "storage.teacher_cache",
    "show_mixture": "loading.mixture",
    "batches": "loading.loader",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    home = _HOMES.get(RENAMED.get(name, name))
    if home is None:
        raise AttributeError(f"module 'efftrain.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"efftrain.data.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
