"""Names of the Hugging Face Hub: only weights and texts are downloaded, and what fails is one sentence."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from flax import nnx

from efftrain.cli.main import main
from efftrain.config import to_json
from efftrain.errors import ConfigError, RunError
from efftrain.interop.export_model import export_model
from efftrain.interop.import_model import import_model
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.train.run.model_run import write_model_run
from efftrain.train.state import split_model

hub = pytest.importorskip("huggingface_hub", reason="needs the extra interop")

CONFIG = llama(vocab_size=31, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=12, max_length=16)
NAME, COMMIT = Path("someone/a-model"), "0123abcd"
LICENCE = "---\nlicense: apache-2.0\n---\n"
OTHER_FILES = ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "onnx/model.json", "tf_model.h5")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    _, params, rest = split_model(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    state = {"params": params, "model_state": rest}
    write_model_run(folder / "run", state, step=0, made_from=("made.json", {}), config={"model": to_json(CONFIG)})
    export_model(folder / "run", folder / "repository")
    (folder / "repository" / "README.md").write_text(LICENCE)
    for name in OTHER_FILES:
        (folder / "repository" / name).parent.mkdir(exist_ok=True)
        (folder / "repository" / name).write_bytes(b"not to be read")
    return folder / "repository"


@pytest.fixture
def remote(repository, tmp_path, monkeypatch):
    """Puts a copy in the place of ``snapshot_download``, which filters as the package does; returns the cache."""
    cache = tmp_path / "cache" / COMMIT

    def download(name, *, allow_patterns, ignore_patterns):
        assert name == str(NAME)
        files = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        for file in hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, cache / file)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return cache


def test_a_model_is_downloaded_without_pickles_and_code_and_its_origin_is_kept(remote, tmp_path):
    assert import_model(NAME, tmp_path / "run") == CONFIG
    names = {file.name for file in remote.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    found = json.loads((tmp_path / "run" / "import.json").read_text())
    assert (found["source"], found["revision"], found["license"]) == (str(NAME), COMMIT, "apache-2.0")


def test_a_folder_of_that_name_wins(remote, repository, tmp_path):
    shutil.copytree(repository, tmp_path / NAME, ignore=lambda *_: OTHER_FILES)
    import_model(NAME, tmp_path / "run")
    assert not remote.exists()
    found = json.loads((tmp_path / "run" / "import.json").read_text())
    assert found["source"] == "a-model"
    assert "revision" not in found


@pytest.mark.parametrize("path", ["a-model", "a/b/c", "../a/b", "../model", "someone/model.gguf", "/a/b"])
def test_other_paths_are_not_looked_for_on_the_hub(remote, path, tmp_path):
    with pytest.raises(ConfigError, match="is neither a folder nor a GGUF file"):
        import_model(Path(path), tmp_path / "run")
    assert not remote.exists()


def test_a_missing_package_is_one_sentence_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'efftrain\[interop\]', or give the folder of a model"):
        import_model(NAME, tmp_path / "run")


def test_being_offline_is_one_sentence(tmp_path, monkeypatch, capsys):
    """The error of the package itself, as with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["import", str(NAME), "--out", "run"])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"error: {NAME} does not exist here and cannot be downloaded (Cannot find an appropriate")
    assert said.endswith("or give the folder of a model")
    assert not (tmp_path / "run").exists()


def test_a_missing_repository_is_one_sentence(tmp_path, monkeypatch):
    httpx = pytest.importorskip("httpx")
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/api/models/someone/a-model"))

    def download(*_, **__):
        raise hub.errors.RepositoryNotFoundError("404 Client Error.\n\nRepository Not Found.", response=response)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(RunError, match=r"cannot be downloaded \(404 Client Error. Repository Not Found\); check"):
        import_model(NAME, tmp_path / "run")
