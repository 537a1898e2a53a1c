"""Finds anomalies in a corpus that a person should check before training on it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SOURCE_LOSS = 0.5  # share of the documents or bytes of a source whose removal raises an alarm
RULE_LOSS = 0.3  # share of the documents that reach a rule whose removal by it raises an alarm
FAILED = "failed/"  # beginning of the stages that drop documents for which a rule raised an exception
RECALL = 0.9  # required recall of planted duplicates at or above the threshold; bands cannot guarantee 1


def alarms(manifest: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each anomaly in the manifest of a corpus, the worst kinds and largest sources first."""
    return [
        *_unreadable(manifest.get("unreadable") or {}),
        *_canary(manifest.get("near_duplicates")),
        *_splits(manifest),
        *_tokenizer(manifest.get("tokenizer") or {}),
        *_decontamination(manifest.get("decontamination") or {}),
        *_rules(manifest["funnel"]),
        *_sources(manifest.get("sources") or {}),
    ]


def _unreadable(found: Mapping[str, Any]) -> Iterator[str]:
    if n_files := found.get("files"):
        yield (
            f"{n_files:,} file{'s' * (n_files > 1)} could not be read to the end, such as "
            f"{found['first'][0]}; the amount of missing text is unknown."
        )


def _canary(found: Mapping[str, Any] | None) -> Iterator[str]:
    if not found or not (canary := found.get("canary")):
        return
    if not canary["planted"]:
        yield "No canary was planted, so it is unknown how many near duplicates the search finds."
    elif canary["found"] < RECALL * canary["planted"]:
        yield (
            f"Of {canary['planted']:,} planted duplicates only {canary['found']:,} were found: near duplicates are "
            "left in the corpus; use more bands of fewer rows."
        )


def _splits(manifest: Mapping[str, Any]) -> Iterator[str]:
    configured = manifest["parameters"].get("split") or {}
    wanted = ["train", *(name for name in ("validation", "test") if configured.get(name))]
    for split in dict.fromkeys([*wanted, *manifest["splits"]]):
        if not manifest["splits"].get(split, {}).get("documents"):
            yield f"The split {split} has no documents."
    if manifest.get("split_by") == "document":
        yield (
            "There are fewer groups of documents than splits, so single documents were held out: parts of one group "
            "may stand on both sides."
        )


def _tokenizer(found: Mapping[str, Any]) -> Iterator[str]:
    if found.get("lossless") is False:
        yield (
            f"Decoding does not restore the text: the tokenizer loses or replaces {found['lost']:.2%} of the bytes of "
            "a sample, and a model that is trained on its tokens can neither read nor write them."
        )
    if added := found.get("added_before"):
        yield (
            f"The tokenizer itself puts {added!r} before each text, and the documents of this corpus begin with "
            f"{found['end_of_text']!r}. For a pretrained model that always had {added!r} there, such as Gemma, set "
            f"corpus.end_of_text to {added!r}."
        )
    if n_cut := found.get("cut_documents"):
        yield (
            f"{n_cut:,} long documents, such as {found['first_cut']}, have no space at which they can be cut, so they "
            "were tokenized in parts: tokens at the cuts may differ from those of the whole text."
        )


def _decontamination(sets: Mapping[str, Any]) -> Iterator[str]:
    for name, figures in sets.items():
        if not figures["documents"]:
            yield f"The evaluation set {name} has no documents, so nothing was compared with it."
        elif short := figures.get("short"):
            yield (
                f"{short:,} of {figures['documents']:,} documents of the evaluation set {name} are too short to be "
                "searched for inside training documents; give its questions together with their answers or context."
            )


def _rules(funnel: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    reached = funnel[0]["documents"]
    for row in funnel[1:-1]:
        failed = row["stage"].startswith(FAILED)
        if reached and (row["documents"] / reached > RULE_LOSS or failed):
            yield (
                f"{row['stage']} drops {row['documents'] / reached:.0%} of the documents that reach it "
                f"({row['documents']:,} of {reached:,}){_example(row)}."
            )
        reached -= row["documents"]


def _sources(sources: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    for source, funnel in sorted(sources.items(), key=lambda item: -item[1][0]["bytes"]):
        lost = {unit: _lost(funnel, unit) for unit in ("documents", "bytes")}
        if max(lost.values()) > SOURCE_LOSS:
            rules = [row for row in funnel if row["stage"] not in ("seen", "kept")]
            most = max(rules, key=lambda row: row["documents"])
            yield (
                f"The source {source} loses {lost['documents']:.0%} of its documents and {lost['bytes']:.0%} of its "
                f"bytes, most documents to {most['stage']} ({most['documents']:,}){_example(most)}."
            )


def _example(row: Mapping[str, Any]) -> str:
    return f", such as {row['example']}" if row.get("example") else ""


def _lost(funnel: Sequence[Mapping[str, Any]], unit: str) -> float:
    rows = {row["stage"]: row[unit] for row in funnel}
    return 1 - rows["kept"] / rows["seen"] if rows["seen"] else 0.0
