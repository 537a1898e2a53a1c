"""What importing costs: the command line and the corpus room must not wait for JAX."""

import subprocess
import sys

import pytest

HEAVY = ("jax", "flax", "tensorflow", "tensorflow_datasets", "orbax", "optax", "pyarrow")


@pytest.mark.parametrize("module", ["efftrain", "efftrain.cli.main", "efftrain.recipe", "efftrain.sharding.mesh"])
@pytest.mark.smoke
def test_import_is_light(module):
    program = f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    assert run(program) == ""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_folder_hides_a_function_of_the_corpus_room():
    """An imported module becomes an attribute of its package, in place of what the package offers by that name."""
    program = (
        "import importlib, pkgutil, types\nfrom efftrain import data\n"
        "for module in pkgutil.walk_packages(data.__path__, 'efftrain.data.'): importlib.import_module(module.name)\n"
        "print(*(name for name in data.__all__ if isinstance(getattr(data, name), types.ModuleType)))"
    )
    assert run(program) == ""
