"""Recipes and commands as a user starts them, but compiled without optimisation: most of their time is compilation.

``start`` and ``run_alone`` launch Python anew, as a user does. ``run`` forks a process that has imported everything
already, which saves the three seconds of imports that a tiny run would spend most of its time on.
"""

import atexit
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import jax
import numpy as np
from flax import nnx

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["everything"])


def variables() -> dict[str, str]:
    """One device, as on a laptop, and the flags of the tests."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "host_platform_device_count" not in flag]
    return {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def start(command: list[str], **more: str) -> subprocess.Popen:
    environment = os.environ | more | variables()
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as a user has it
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_alone(command: list[str]) -> tuple[int, str]:
    process = start(command)
    output, _ = process.communicate()
    return process.returncode, output


def run(command: list[str]) -> tuple[int, str]:
    """Exit code and output of a command, which begins with ``sys.executable``."""
    assert command[0] == sys.executable
    with tempfile.NamedTemporaryFile("r") as output:
        process = FORKS.Process(target=execute, args=(list(map(str, command[1:])), variables(), output.name))
        process.start()
        process.join()
        code = process.exitcode
        process.close()
        return code, output.read()


def execute(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """In the fork: what ``python ARGUMENTS`` does."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb", closefd=False), write_through=True) for n in (1, 2))
    sys.orig_argv = [sys.executable, *arguments]
    code = 1
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.exit(code)


def compress(*arguments: str | Path) -> tuple[int, str]:
    return run([sys.executable, "-m", "efftrain.cli", "compress", *map(str, arguments)])


def logits(model: nnx.Module) -> np.ndarray:
    graph, state = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 16))
    return np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state))
