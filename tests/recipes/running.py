"""Recipes as processes, as a user starts them."""

import os
import subprocess


def start(command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(command: list[str]) -> tuple[int, str]:
    process = start(command)
    output, _ = process.communicate()
    return process.returncode, output
