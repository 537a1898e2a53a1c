"""A second start of a recipe loads what the first one compiled; who wants another folder, or none, gets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny

from efftrain import recipe
from efftrain.recipe import JAX_CACHE, compilation_cache, use_compilation_cache

RECIPE = Path(__file__).with_name("cached_recipe.py")


def start(out: Path, **changes: str) -> tuple[dict[str, float], str]:
    """Figures of a run in its own process, which is told nothing of the tests' own cache."""
    environment = {k: v for k, v in tiny.environment().items() if not k.startswith(("JAX_COMPILATION", "JAX_PERS"))}
    done = subprocess.run(
        [sys.executable, str(RECIPE), "tiny", "--out", str(out)],
        env=environment | changes,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "training.json").read_text()), done.stderr


def programs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("jit_step-*-cache"))


def test_a_second_start_loads_the_step_that_the_first_one_compiled(tmp_path):
    cache = str(tmp_path / "cache")
    first, _ = start(tmp_path / "first", XDG_CACHE_HOME=cache)
    (program,) = programs(tmp_path / "cache" / "efftrain" / "xla")
    second, said = start(tmp_path / "second", XDG_CACHE_HOME=cache)
    assert (first["compile_cached"], second["compile_cached"]) == (0.0, 1.0)
    assert programs(tmp_path / "cache") == [program]
    assert "Error" not in said
    # The same program, loaded instead of compiled, computes the same.
    assert tiny.numbers(tmp_path / "first") == tiny.numbers(tmp_path / "second")


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """As in a process that has imported JAX and has no folder yet; nothing of it stays."""
    monkeypatch.setenv(JAX_CACHE, "any")  # so that what the test sets is taken back
    monkeypatch.delenv(JAX_CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_jax_that_is_imported_already_is_told_and_so_are_subprocesses(no_cache, tmp_path):
    use_compilation_cache()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.is_dir()
    assert folder.is_relative_to(tmp_path / "efftrain" / "xla")
    assert os.environ[JAX_CACHE] == str(folder)


@pytest.mark.parametrize(("variable", "value"), [("EFFTRAIN_CACHE", "off"), (JAX_CACHE, "mine")])
def test_off_keeps_nothing_and_a_folder_for_jax_is_respected(no_cache, monkeypatch, tmp_path, variable, value):
    monkeypatch.setenv(variable, value)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None  # JAX itself has read its variable when it was imported
    assert os.environ.get(JAX_CACHE) == (value if variable == JAX_CACHE else None)
    assert not (tmp_path / "efftrain").exists()


def test_a_folder_that_the_program_itself_gave_to_jax_stays(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "mine")
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "mine"


def test_a_home_that_cannot_be_written_to_is_no_obstacle(no_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_unlike_processors_have_unlike_folders(monkeypatch, tmp_path):
    """A home directory may be shared by them, and a program for one can be an illegal instruction on another."""
    folders = set()
    for flags in ("fpu sse avx2", "fpu sse avx2 avx512f"):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n")
        monkeypatch.setattr(
            recipe, "Path", lambda path: tmp_path / "cpuinfo" if path == "/proc/cpuinfo" else Path(path)
        )
        folders.add(compilation_cache())
        assert compilation_cache() in folders  # and like ones the same
    assert len(folders) == 2
