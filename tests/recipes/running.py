"""Recipes as processes, as a user starts them, but compiled without optimisation: most of their time is compilation."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx


def start(command: list[str], **variables: str) -> subprocess.Popen:
    environment = os.environ | variables | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as a user has it
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(command: list[str]) -> tuple[int, str]:
    process = start(command)
    output, _ = process.communicate()
    return process.returncode, output


def compress(*arguments: str | Path) -> tuple[int, str]:
    return run([sys.executable, "-m", "efftrain.cli", "compress", *map(str, arguments)])


def logits(model: nnx.Module) -> np.ndarray:
    graph, state = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 16))
    return np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state))
