"""The same corpus on any engine; what died goes on where it stopped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from efftrain import data
from efftrain.config import difference, to_json
from efftrain.data.dedup.minhash import MinHash
from efftrain.data.rules import TooShort
from efftrain.data.sources import base as sources
from efftrain.data.splits import SPLITS
from efftrain.data.stages.engines import Beam, Local
from efftrain.data.storage.store import unfinished_path
from efftrain.errors import ConfigError, CorpusError
from efftrain.recipe import import_script

N_DOCUMENTS, N_EXACT, N_NEAR, N_SHORT = 4000, 300, 600, 100


@pytest.fixture(scope="module")
def five_thousand(tmp_path_factory):
    """JSON lines in three files: distinct texts, repeats, near repeats of known similarity, and texts too short."""
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(3000)]
    texts = [" ".join(rng.choice(words, size=int(rng.integers(60, 120)))) for _ in range(N_DOCUMENTS)]
    near = []
    for text in texts[:N_NEAR]:
        replaced = text.split()
        replaced[int(rng.integers(5, 50))] = "other"
        near.append(" ".join(replaced))
    texts += texts[1000 : 1000 + N_EXACT] + near + ["x"] * N_SHORT
    rows = [{"text": texts[i], "id": f"d{i:04d}", "package": f"p{i % 200}"} for i in rng.permutation(len(texts))]
    folder = tmp_path_factory.mktemp("five_thousand")
    for number in range(3):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[number::3]))
    return folder


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    monkeypatch.setattr(sources, "RANGE_BYTES", 200_000)


@pytest.fixture
def config(five_thousand, small_pieces):
    source = data.JsonLines(path=five_thousand, id_field="id", group_field="package")
    return data.CorpusConfig(
        sources=(source,),
        rules=(TooShort(threshold=10),),
        near_duplicates=MinHash(),
        vocabulary=300,
        shard_bytes=200_000,
    )


@pytest.fixture(scope="module")
def reference(five_thousand, tmp_path_factory):
    """Built in this process, and in one piece."""
    source = data.JsonLines(path=five_thousand, id_field="id", group_field="package")
    config = data.CorpusConfig(
        sources=(source,),
        rules=(TooShort(threshold=10),),
        near_duplicates=MinHash(),
        vocabulary=300,
        shard_bytes=200_000,
    )
    return data.build(config, tmp_path_factory.mktemp("reference") / "corpus", engine=Local(processes=1))


def same(one, other) -> list[str]:
    """Differences, apart from the order of rows in the tables that follow the pieces."""
    kept = [{n: f for n, f in c.manifest["files"].items() if not n.endswith(".parquet")} for c in (one, other)]
    funnels = [c.manifest["sources"] for c in (one, other)]
    return difference(kept[0], kept[1]) + difference(*funnels)


def test_what_was_planted_is_found(reference):
    stages = {row["stage"]: row["documents"] for row in reference.filter_statistics}
    assert stages["too_short"] == N_SHORT
    assert stages["exact_duplicate"] == N_EXACT
    assert N_NEAR - 3 <= stages["near_duplicate"] <= N_NEAR  # one word in 60 to 120: similarity above 0.83
    assert reference.manifest["near_duplicates"]["canary"]["planted"] > 50
    kept = {d.id for split in SPLITS for d in reference.documents(split)}
    removed = pq.read_table(reference.path / "removed.parquet").to_pylist()
    assert len(kept) + len(removed) == N_DOCUMENTS + N_EXACT + N_NEAR + N_SHORT
    assert kept.isdisjoint(row["id"] for row in removed)
    near = [row for row in removed if row["rule"] == "near_duplicate"]
    assert all(row["survivor"] in kept and row["score"] >= 0.75 and row["bands"] >= 0 for row in near)
    assert {row["survivor"] for row in near} == {row["cluster"] for row in near}


@pytest.mark.parametrize("processes", [1, 2])
def test_any_number_of_processes_and_pieces_gives_the_same_corpus(config, reference, tmp_path, processes):
    built = data.build(config, tmp_path / "out", engine=Local(processes=processes))
    assert len(built.manifest["pieces"]) > 3 > len(reference.manifest["pieces"])
    assert same(built, reference) == []


@pytest.mark.beam
def test_beam_gives_the_same_corpus(config, reference, tmp_path):
    built = data.build(config, tmp_path / "out", engine=Beam())
    assert same(built, reference) == []


def test_little_memory_sorts_bands_in_parts(config, reference, tmp_path, monkeypatch):
    class Poor(Local):
        budget = 30_000

    built = data.build(config, tmp_path / "out", engine=Poor(processes=1))
    assert same(built, reference) == []


def test_a_killed_build_goes_on_with_the_piece_where_it_stopped(config, reference, tmp_path):
    out = tmp_path / "out"
    build = f"""
import json, os, sys
from efftrain import data
from efftrain.config import from_json
from efftrain.data.sources import base as sources
from efftrain.data.stages.engines import Local
sources.PIECE_BYTES, sources.RANGE_BYTES = 1000, 200_000
if __name__ == "__main__":
    print(os.getpid(), flush=True)
    data.build(from_json(json.loads({json.dumps(to_json(config))!r})), {str(out)!r}, engine=Local(processes=2))
"""
    script = tmp_path / "build.py"
    script.write_text(build)
    process = subprocess.Popen([sys.executable, script], start_new_session=True, stderr=subprocess.DEVNULL)
    signed = unfinished_path(out) / "work" / "sign"
    deadline = time.monotonic() + 120
    while len(list(signed.glob("*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    done = {p: p.stat().st_mtime_ns for stage in ("read", "sign") for p in (signed.parent / stage).glob("*.json")}
    assert done
    seen = {}

    class Watching(Local):
        def run(self, stage, numbers):
            seen[stage.name] = list(numbers)
            for number in super().run(stage, numbers):
                yield number
                if stage.name == "bands":
                    seen["kept"] = {p: p.stat().st_mtime_ns for p in done}

    built = data.build(config, out, engine=Watching(processes=1))
    assert "read" not in seen  # all pieces were read before
    assert seen["kept"] == done
    assert same(built, reference) == []


class Poison(TooShort):
    """Kills the worker that reads it."""

    def score(self, text):
        os._exit(9)


def test_a_worker_that_dies_is_one_sentence(config, tmp_path):
    poisoned = data.CorpusConfig(sources=config.sources, rules=(Poison(),))
    with contextlib.closing(Local(processes=2)) as engine:
        with pytest.raises(CorpusError, match=r"stage 'read' died.*fewer processes than 2"):
            data.build(poisoned, tmp_path / "out", engine=engine)
        assert not (tmp_path / "out").exists()
        healthy = data.CorpusConfig(sources=config.sources, rules=(), vocabulary=300)
        assert data.build(healthy, tmp_path / "out", engine=engine).n_tokens("train") > 0


BASE = """
from efftrain.data.rules import TooShort

class Short(TooShort):
    name = "short"
"""
DERIVED = "from efftrain_script_base_rules import Short\nclass Shorter(Short):\n    name = 'shorter'\n"


def test_workers_import_the_scripts_of_the_task_and_what_these_import(config, tmp_path, monkeypatch):
    """Not every script that this process imported: another one may need what is not there any more."""
    for name, text in {"base_rules": BASE, "derived_rules": DERIVED, "unrelated": "import gone_by_now"}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"efftrain_script_{name}", raising=False)
    monkeypatch.setitem(sys.modules, "gone_by_now", sys)
    for name in ("unrelated", "base_rules", "derived_rules"):
        module = import_script(tmp_path / f"{name}.py")
        monkeypatch.setitem(sys.modules, module.__name__, sys.modules.pop(module.__name__))  # so that it goes again
    corpus = data.CorpusConfig(sources=config.sources, rules=(module.Shorter(threshold=10),), vocabulary=300)
    built = data.build(corpus, tmp_path / "out", engine=Local(processes=2))
    assert {row["stage"]: row["documents"] for row in built.filter_statistics}["shorter"] == N_SHORT


@pytest.mark.parametrize("fields", [{"processes": 0}, {"memory": 1000}])
def test_an_impossible_engine_is_refused(fields):
    with pytest.raises(ConfigError, match=r"engine\."):
        Local(**fields)
