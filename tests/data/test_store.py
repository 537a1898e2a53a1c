import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from efftrain import data
from efftrain.config import difference, from_json, to_json
from efftrain.data.documents import Text
from efftrain.data.pipeline import build as pipeline
from efftrain.data.rules import Generated, LongLine, TooShort
from efftrain.data.splits import SPLITS, SplitByGroup
from efftrain.data.stages.engines import Local
from efftrain.data.storage.shards import file_digest
from efftrain.data.storage.store import unfinished_path, write_manifest
from efftrain.errors import ConfigError, CorpusError, InUseError
from efftrain.lock import beside


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithoutFirstWord:
    """An edit."""

    name: ClassVar[str] = "without_first_word"

    def edit(self, text):
        return Text(text.text.removeprefix("document "), text.id)


def read_all(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_bytes().decode() for p in sorted(folder.rglob("*.txt"))}


@pytest.fixture
def copy(corpus, tmp_path) -> Path:
    return shutil.copytree(corpus.path, tmp_path / "copy")


@pytest.mark.smoke
def test_every_document_comes_back_unchanged(corpus, documents):
    found = {d.id: d.text for split in SPLITS for d in corpus.documents(split)}
    assert found == read_all(documents)
    assert sum(corpus.splits[s]["documents"] for s in SPLITS) == len(found)
    assert sum(corpus.splits[s]["bytes"] for s in SPLITS) == sum(len(t.encode()) for t in found.values())


def test_no_package_is_in_two_splits(corpus):
    groups = {split: {d.group for d in corpus.documents(split)} for split in SPLITS}
    assert all(groups.values())
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 15


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.smoke
def test_the_token_stream_is_the_documents_one_after_the_other(corpus, split):
    expected = []
    for document in corpus.documents(split):
        expected += [0, *corpus.tokenizer().encode(document.text).ids]
    tokens = corpus.tokens(split)
    assert len(tokens) == corpus.n_tokens(split) == len(expected)
    assert tokens[:].tolist() == expected
    rng = np.random.default_rng(0)
    for start, stop in rng.integers(-5, len(expected) + 100, (50, 2)):
        assert tokens[start:stop].tolist() == expected[start:stop]
    assert corpus.token_bytes()[tokens[:]].sum() == corpus.splits[split]["bytes"]


def test_documents_are_shuffled(corpus):
    ids = [d.id for d in corpus.documents("train")]
    assert ids != sorted(ids)


def test_the_manifest_gives_back_the_configuration(corpus, documents, config_for):
    assert from_json(corpus.manifest["parameters"]) == config_for(documents)
    python = data.CorpusConfig(sources=(data.PythonFiles(),), tokenizer=Path("tokenizer.json"))
    assert from_json(json.loads(json.dumps(to_json(python)))) == python


def test_a_manifest_holds_no_number_that_json_has_no_word_for(tmp_path):
    write_manifest(tmp_path, {"rate": math.nan, "edges": [1.0, math.inf]})
    text = (tmp_path / "manifest.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"the manifest holds {name}"))
    assert (found["rate"], found["edges"]) == (None, [1.0, None])


def test_two_builds_give_the_same_bytes(corpus, documents, tmp_path, config_for):
    again = data.build(config_for(documents), tmp_path / "again")
    assert {k: v for k, v in again.manifest["files"].items() if k != "removed.parquet"} == {
        k: v for k, v in corpus.manifest["files"].items() if k != "removed.parquet"
    }
    assert len([name for name in again.manifest["files"] if name.startswith("text/text-train")]) > 1


def test_a_build_opens_as_tfds_without_tensorflow(corpus):
    code = f"""
import sys
import tensorflow_datasets as tfds
text = tfds.builder_from_directory({str(corpus.path / "text")!r}).as_data_source("train")
part = tfds.builder_from_directory({str(corpus.path / "text")!r}).as_data_source("train[10:20]")
tokens = tfds.builder_from_directory({str(corpus.path / "tokens")!r}).as_data_source("train")
assert [r["id"] for r in part] == [text[i]["id"] for i in range(10, 20)]
from efftrain import data
assert next(data.batches(data.LoaderConfig(corpora=(data.Part(path={str(corpus.path)!r}),), length=32)))
print(len(text), tokens[0]["tokens"].dtype, tokens[0]["tokens"].shape, "tensorflow" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[0] == f"{corpus.splits['train']['documents']} uint16 (64,) False"


def test_importing_the_room_is_light():
    code = "import sys; from efftrain.data import CorpusConfig, LoaderConfig, Tfds, build; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "grain", "tensorflow_datasets", "tensorflow", "pyarrow", "tokenizers"} & set(modules)


def test_a_second_build_does_nothing_and_says_so(copy, documents, capfd, config_for):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    data.build(config_for(documents), copy)
    assert "up to date" in capfd.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before


@pytest.mark.parametrize("what", ["parameters", "inputs"])
def test_a_corpus_of_something_else_is_never_overwritten_silently(copy, documents, tmp_path, what, config_for):
    folder = shutil.copytree(documents, tmp_path / "text")
    data.build(config_for(folder), copy, overwrite=True)
    before = file_digest(copy / "manifest.json")
    if what == "inputs":
        next(folder.rglob("*.txt")).write_text("changed")
    config = config_for(folder, vocabulary=290 if what == "parameters" else 300)
    message = r"parameters\.vocabulary: 300 -> 290" if what == "parameters" else r"inputs\[0\]"
    with pytest.raises(CorpusError, match=message + ".*choose another folder, delete this one, or .*--overwrite"):
        data.build(config, copy)
    assert file_digest(copy / "manifest.json") == before
    assert data.build(config, copy, overwrite=True).manifest["parameters"]["vocabulary"] == config.vocabulary
    assert not list(copy.parent.glob("*.replaced"))


def test_a_folder_that_is_no_corpus_is_left_alone(tmp_path, documents, config_for):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("words")
    for overwrite in (False, True):
        with pytest.raises(CorpusError, match="is not a corpus"):
            data.build(config_for(documents), tmp_path / "precious", overwrite=overwrite)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "words"


def test_a_failed_overwrite_keeps_the_old_corpus(copy, documents, config_for):
    with pytest.raises(CorpusError, match="no document is left"):
        data.build(config_for(documents, rules=(TooShort(threshold=10**6),)), copy, overwrite=True)
    assert data.open(copy).n_tokens("train") > 0


def shards(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.array_record*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap"])
@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_a_damaged_shard_is_refused_by_name(copy, damage, kind):
    name, other = [n for n in shards(copy) if n.startswith(f"{kind}/{kind}-train")][:2]
    path = copy / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "swap":
        path.write_bytes((copy / other).read_bytes())
    else:
        path.unlink()
    with pytest.raises(CorpusError, match=name.split("/")[1]):
        data.open(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "removed.parquet", "text/features.json"])
def test_every_other_file_is_checked_too(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes().replace(b"e", b"f", 1))
    with pytest.raises(CorpusError, match=name):
        data.open(copy)


def test_manifests_that_cannot_be_used_are_refused(copy, tmp_path):
    with pytest.raises(CorpusError, match="there is no corpus"):
        data.open(tmp_path / "nowhere")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CorpusError, match="corpus format 99"):
        data.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(CorpusError, match="damaged"):
        data.open(copy)
    with pytest.raises(ConfigError, match="no split 'dev'"):
        data.Corpus(copy, manifest).n_tokens("dev")


def test_funnel_and_evidence_account_for_every_document(tmp_path, config_for, write_documents):
    folder = write_documents(tmp_path / "text", n=40, groups=8)
    (folder / "p00" / "bad.txt").write_bytes(b"\xff\xfd")
    (folder / "p01" / "short.txt").write_text("x")
    (folder / "p02" / "long.txt").write_text("word " * 1000)
    original = folder / "p03" / "doc003.txt"
    (folder / "p07" / "zcopy.txt").write_bytes(original.read_bytes().replace(b"\n", b"  \r\n\r\n"))
    corpus = data.build(config_for(folder, rules=(TooShort(), LongLine(threshold=4000))), tmp_path / "out")
    found = {row["stage"]: row["documents"] for row in corpus.filter_statistics}
    assert found == {"seen": 44, "undecodable": 1, "too_short": 1, "long_line": 1, "exact_duplicate": 1, "kept": 40}
    read = [p.read_bytes().replace(b"\r\n", b"\n") for p in folder.rglob("*.txt")]
    assert corpus.filter_statistics[0]["bytes"] == sum(map(len, read))
    assert corpus.filter_statistics[-1]["bytes"] == sum(figures["bytes"] for figures in corpus.splits.values())
    removed = {row["id"]: row for row in pq.read_table(corpus.path / "removed.parquet").to_pylist()}
    assert {id: row["rule"] for id, row in removed.items()} == {
        "p00/bad.txt": "undecodable",
        "p01/short.txt": "too_short",
        "p02/long.txt": "long_line",
        "p07/zcopy.txt": "exact_duplicate",
    }
    assert removed["p07/zcopy.txt"]["survivor"] == "p03/doc003.txt"
    assert removed["p02/long.txt"]["score"] == 5000
    assert removed["p01/short.txt"]["excerpt"] == "x"


def test_half_a_surrogate_pair_is_listed_and_not_fatal(tmp_path, config_for):
    rows = [{"text": f"document {n}", "id": n} for n in range(20)] + [{"text": "\ud800", "id": "\udfff"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = data.JsonLines(path=tmp_path / "a.jsonl", id_field="id")
    corpus = data.build(config_for(tmp_path, sources=(source,)), tmp_path / "out")
    row = next(row for row in corpus.filter_statistics if row["stage"] == "undecodable")
    assert (row["documents"], row["bytes"]) == (1, 1)
    assert "surrogates not allowed" in row["example"]


def test_an_empty_result_names_the_rule(documents, tmp_path, config_for):
    config = config_for(documents, rules=(LongLine(threshold=4000), TooShort(threshold=10**6)))
    with pytest.raises(CorpusError, match="'too_short' removed most"):
        data.build(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_documents_are_dealt_singly_where_there_are_too_few_groups(tmp_path, config_for, write_documents, capfd):
    folder = write_documents(tmp_path / "text", n=30, groups=2)
    corpus = data.build(config_for(folder), tmp_path / "out")
    assert set(corpus.splits) == set(SPLITS)
    assert corpus.manifest["split_by"] == "document"
    assert "single documents were held out" in " ".join(capfd.readouterr().err.split())
    no_test = SplitByGroup(validation=0.2, test=0)
    by_group = data.build(config_for(folder, split=no_test), tmp_path / "two")
    assert set(by_group.splits) == {"train", "validation"}
    assert by_group.manifest["split_by"] == "group"


def test_impossible_configurations_are_named(config_for):
    with pytest.raises(ConfigError, match=r"corpus\.sources is empty"):
        data.CorpusConfig(sources=())
    with pytest.raises(ConfigError, match="257"):
        config_for(Path("x"), vocabulary=100)
    with pytest.raises(ConfigError, match=r"corpus\.block"):
        config_for(Path("x"), block=0)


SLOW_BUILD = """
import importlib, json, sys, time
from efftrain import data
from efftrain.config import from_json
module, stage = sys.argv[3].split(":")
def slow(*args, **kwargs):
    print("here", flush=True)
    time.sleep(60)
setattr(importlib.import_module("efftrain.data.pipeline." + module), stage, slow)
data.build(from_json(json.loads(sys.argv[1])), sys.argv[2])
"""


@pytest.mark.parametrize("stage", ["reading:text_digest", "writing:train_tokenizer", "writing:write_tokens"])
def test_a_killed_build_leaves_nothing_that_looks_complete(corpus, documents, tmp_path, stage, capfd, config_for):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, json.dumps(to_json(config_for(documents))), out, stage],
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"here\n"
    with pytest.raises(InUseError, match=rf"{out} is in use by process {process.pid} on \S+; wait for it or"):
        data.build(config_for(documents), out)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert unfinished_path(out).exists()
    assert beside(out).exists()  # nobody could tidy it up
    with pytest.raises(CorpusError, match="interrupted"):
        data.open(out)
    capfd.readouterr()
    again = data.build(config_for(documents), out)
    said = capfd.readouterr().err
    assert "continuing it" in said
    assert ("Reading and filtering" in said) == stage.startswith("reading")  # what was done is not done again
    assert not unfinished_path(out).exists()
    assert not beside(out).exists()
    assert difference(corpus.manifest["files"], again.manifest["files"]) == []


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounts a small file system")
@pytest.mark.parametrize("size", ["100k", "700k"])
def test_a_full_disk_is_one_sentence(documents, tmp_path, size, config_for):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        with pytest.raises(CorpusError, match="is full; free space"):
            data.build(config_for(documents), disk / "out")
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_place_that_cannot_be_written_is_named(documents, tmp_path, config_for):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match="cannot write"):
        data.build(config_for(documents), tmp_path / "file" / "out")


def test_the_script_of_the_python_corpus(tmp_path, monkeypatch, write_documents):
    """With a few files in place of the interpreter's, as a command."""
    from efftrain.recipe import import_script

    script = import_script(Path(__file__).parents[2] / "data" / "python.py")
    write_documents(tmp_path / "text")
    small = data.TextFolder(path=tmp_path / "text", group_by_folder=True)
    monkeypatch.setattr(data, "PythonFiles", lambda **_: small, raising=False)
    corpus = script.main(script.Config(out=tmp_path / "out", vocabulary=300))
    assert data.open(tmp_path / "out").n_tokens("train") == corpus.n_tokens("train")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file names are bytes on Linux only")
def test_scores_are_used_again_for_a_file_with_a_badly_encoded_name(documents, tmp_path, config_for):
    folder = shutil.copytree(documents, tmp_path / "text")
    (Path(os.fsdecode(os.fsencode(folder) + b"/p00/caf\xe9.txt"))).write_text("a text of its own " * 9)
    strict, loose = (config_for(folder, rules=(TooShort(threshold=threshold),)) for threshold in (100, 90))
    data.build(strict, tmp_path / "out")
    assert data.build(loose, tmp_path / "out", overwrite=True).filter_statistics[0]["documents"] == 91


def test_kept_bytes_are_those_of_the_splits_also_where_texts_were_edited(documents, tmp_path, config_for):
    config = config_for(documents, rules=(WithoutFirstWord(),), line_deduplication=data.LineDeduplication(min_chars=5))
    corpus = data.build(config, tmp_path / "out")
    rows = {row["stage"]: row for row in corpus.filter_statistics}
    assert rows["edited"]["documents"] == 0
    assert rows["edited"]["bytes"] == 90 * len("document ")
    assert rows["kept"]["bytes"] == sum(corpus.splits[split]["bytes"] for split in corpus.splits)
    assert rows["kept"]["documents"] == sum(corpus.splits[split]["documents"] for split in corpus.splits)


def test_pipeline_names_the_missing_source_before_it_writes(tmp_path, config_for):
    with pytest.raises(CorpusError, match="nowhere"):
        pipeline.build(config_for(tmp_path / "nowhere"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_threshold_is_applied_without_scoring_again(documents, tmp_path, config_for, monkeypatch, capfd):
    """And gives what scoring again gives, to the byte."""
    lengths = sorted(len("".join(text.split())) for text in read_all(documents).values())
    strict, loose = (
        config_for(documents, rules=(TooShort(threshold=threshold),)) for threshold in (lengths[30], lengths[10])
    )
    expected = data.build(loose, tmp_path / "fresh")
    out = data.build(strict, tmp_path / "out").path

    def score(self, text):
        raise AssertionError("scored again")

    with monkeypatch.context() as patch:
        patch.setattr(TooShort, "score", score)
        changed = data.build(loose, out, overwrite=True, engine=Local(processes=1))
    assert "only thresholds differ" in capfd.readouterr().err
    assert changed.manifest["files"] == expected.manifest["files"]
    assert changed.filter_statistics != data.build(strict, tmp_path / "strict").filter_statistics


def test_a_rule_that_scores_differently_scores_again(documents, tmp_path, config_for):
    out = data.build(config_for(documents, rules=(Generated(lines=3),)), tmp_path / "out").path
    again = data.build(config_for(documents, rules=(Generated(lines=4),)), out, overwrite=True)
    assert again.manifest["scoring"][0]["lines"] == 4


def test_two_rules_of_one_name_are_refused(documents, tmp_path, config_for):
    with pytest.raises(ConfigError, match="'too_short' twice"):
        data.build(config_for(documents, rules=(TooShort(), TooShort(threshold=3))), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"corpus\.quality is 'beauty'"):
        data.build(config_for(documents, quality="beauty"), tmp_path / "out")


def test_texts_that_are_empty_are_counted(documents, tmp_path, config_for):
    folder = shutil.copytree(documents, tmp_path / "text")
    (folder / "p00" / "empty.txt").write_text("")
    (folder / "p00" / "blank.txt").write_text(" \n\t\n")
    (folder / "p00" / "null.txt").write_text("\0" * 50)
    built = data.build(config_for(folder), tmp_path / "out")
    assert {row["stage"]: row["documents"] for row in built.filter_statistics}["empty"] == 2
    assert built.splits["train"]["documents"] + sum(built.splits[s]["documents"] for s in SPLITS[1:]) == 91


def test_documents_that_are_all_the_same_say_so(tmp_path, config_for):
    for number in range(20):
        path = tmp_path / "text" / f"p{number}" / "a.txt"
        path.parent.mkdir(parents=True)
        path.write_text("the same text again and again\n" * 3)
    with pytest.raises(CorpusError, match=r"only 1 document is left for 3 splits; .*AtBlankLines"):
        data.build(config_for(tmp_path / "text"), tmp_path / "out")
