"""``efftrain VERB`` as a user calls it: in its own process."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

RECIPE = """
from dataclasses import dataclass
from efftrain.models.config import ModelConfig, llama
from efftrain.sharding.mesh import MeshConfig

@dataclass(frozen=True)
class Config:
    model: ModelConfig
    mesh: MeshConfig

def model(d_model, n_heads):
    return llama(vocab_size=64, d_model=d_model, n_layers=2, n_heads=n_heads, d_ff=32, max_length=16)

configs = {
    "tiny": Config(model(16, 4), MeshConfig(fsdp=2, tensor=4)),
    "odd": Config(model(20, 2), MeshConfig(fsdp=8)),
}
"""


def efftrain(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "efftrain.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--help"], "doctor"),
        (["doctor", "--help"], "--mesh.fsdp"),
        (["teacher", "--help"], "--top-k"),
        (["compress", "--help"], "structured"),
        (["compress", "structured", "--help"], "--recovery-tokens"),
        (["corpus", "--help"], "inspect"),
        (["corpus", "report", "--help"], "--out"),
        (["corpus", "inspect", "--help"], "--rule"),
    ],
)
def test_help_does_not_wait_for_heavy_imports(arguments, word):
    program = (
        "import sys\nfrom efftrain.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as stop: print('code', stop.code, not {'jax', 'pyarrow', 'plotly'}.isdisjoint(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert word in done.stdout
    assert done.stdout.endswith("code 0 False\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        [],
        ["doctor", "--nonsense", "3"],
        ["doctor", "--mesh.fsdp", "x"],
        ["corpus"],
        ["corpus", "nonsense"],
        ["corpus", "report"],
        ["corpus", "inspect", "folder", "--limit", "x"],
        ["teacher"],
    ],
)
def test_unknown_verb_or_flag_ends_with_code_2(arguments):
    done = efftrain(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.smoke
def test_doctor_shows_versions_devices_mesh_and_layout():
    done = efftrain("doctor", "--fake-devices", "8", XLA_FLAGS="", JAX_PLATFORMS="")
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines()]
    first = {cells[0]: cells[1:] for cells in lines if cells}
    assert first["jaxlib"][1:] == ["<0.12,>=0.10", ""]
    assert first["8"][:2] == ["cpu", "cpu"]
    assert "mesh: replica=1, fsdp=8, expert=1, tensor=1, context=1" in done.stdout
    assert first["embedding.table"] == ["4096 x 384", "float32", "vocab, embed", "-, fsdp", "786.4 kB"]
    assert first["norm.scale"][3] == "replicated"
    assert "that of the host" in done.stdout


def test_fake_devices_count_even_where_others_are_set():
    done = efftrain("doctor", "--fake-devices", "4", "--mesh.tensor", "2")
    assert "fsdp=2, expert=1, tensor=2" in done.stdout


def test_doctor_takes_model_and_mesh_from_a_recipe(recipe):
    done = efftrain("doctor", "--recipe", recipe)
    assert done.returncode == 0, done.stderr
    assert "fsdp=2, expert=1, tensor=4" in done.stdout
    assert "64 x 16" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mesh.fsdp", "3"], "fsdp=3 needs 3 devices and there are 8"),
        (["--mesh.tensor", "0"], "mesh.tensor is 0"),
        (["--fake-devices", "0"], "--fake-devices is 0"),
        (["--recipe", "nowhere.py"], "there is no script nowhere.py"),
        (["--config", "tiny"], "needs the recipe it belongs to"),
        (["--recipe", "RECIPE", "--config", "huge"], "no configuration 'huge'; choose one of tiny, odd"),
        (
            ["--recipe", "RECIPE", "--config", "odd"],
            "(embed) has size 20, which mesh axis fsdp=8 cannot split",
        ),
        (["--recipe", __file__], "has no table `configs`"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(arguments, sentence, recipe):
    done = efftrain("doctor", *(recipe if word == "RECIPE" else word for word in arguments))
    assert done.returncode == 2
    assert sentence in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["report", "inspect"])
def test_corpus_verbs_name_what_is_missing(verb, tmp_path):
    done = efftrain("corpus", verb, str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no corpus" in done.stderr
    (tmp_path / "manifest.json").write_text('{"format": 1, "parameters": {}}')
    done = efftrain("corpus", verb, str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "removed.parquet is missing; build the corpus again" in done.stderr


def test_corpus_report_and_inspect(tmp_path):
    removed = {"id": ["a"], "source": ["web"], "rule": ["too_short"], "score": [3.0], "survivor": [None], "bytes": [3]}
    table = pa.table(removed | {"excerpt": ["abc"]}).cast(
        pa.schema([(name, pa.string()) for name in ("id", "source", "rule")])
        .append(pa.field("score", pa.float64()))
        .append(pa.field("survivor", pa.string()))
        .append(pa.field("bytes", pa.int64()))
        .append(pa.field("excerpt", pa.string()))
    )
    corpus = tmp_path / "small"
    corpus.mkdir()
    pq.write_table(table, corpus / "removed.parquet")
    pq.write_table(pa.table({"id": ["a", "b"], "too_short": [3.0, 90.0]}), corpus / "scores.parquet")
    funnel = [
        {"stage": stage, "documents": n, "bytes": 3 * n} for stage, n in (("seen", 2), ("too_short", 1), ("kept", 1))
    ]
    splits = {"train": {"documents": 1, "bytes": 3, "tokens": 1}}
    (corpus / "manifest.json").write_text(
        json.dumps({"format": 1, "parameters": {}, "funnel": funnel, "splits": splits})
    )
    done = efftrain("corpus", "report", str(corpus), "--out", str(tmp_path / "page.html"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'page.html'}\n"), done.stderr
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()
    done = efftrain("corpus", "inspect", str(corpus), "--rule", "too_short", "--source", "web", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "abc" in done.stdout
