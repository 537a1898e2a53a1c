"""The corpus room: text in, batches out.

    config = data.CorpusConfig(sources=(data.TextFolder(path=Path("essays"), pattern="*.txt"),))
    corpus = data.build(config, Path("corpora/essays"))     # a second call with the same inputs does nothing
    corpus = data.open("corpora/essays")                    # refuses a damaged shard by its name
    loader = data.LoaderConfig(corpora=(data.Part(path=corpus.path),), length=256, batch_size=16)
    for batch in data.batches(loader): ...

Nothing heavy is imported before it is used: TFDS, Grain, pyarrow and tokenizers come with the first call that needs
them.
"""

import importlib

_HOMES = {
    "Corpus": "corpus",
    "CorpusConfig": "corpus",
    "open": "corpus",
    "build": "pipeline",
    "Document": "documents",
    "Skipped": "documents",
    "Verdict": "documents",
    "SplitByPackage": "splits",
    "Decontaminate": "decontaminate",
    "EvaluationSet": "decontaminate",
    "MinHash": "minhash",
    "RepeatedLines": "repeated_lines",
    "Local": "engines",
    "Beam": "engines",
    "JsonLines": "json_source",
    "Parquet": "parquet_source",
    "Arrow": "arrow_source",
    "PythonFiles": "text_source",
    "TextFolder": "text_source",
    "AtBlankLines": "cutting",
    "AtPattern": "cutting",
    "HuggingFaceDataset": "huggingface_source",
    "Piece": "sources",
    "FileSource": "sources",
    "Tfds": "tfds_source",
    "Warc": "warc_source",
    "Code": "rules",
    "Loader": "loader",
    "LoaderConfig": "loader",
    "PackedRows": "loader",
    "Part": "loader",
    "TeacherCache": "teacher_cache",
    "show_mixture": "mixture",
    "batches": "loader",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'efftrain.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"efftrain.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
