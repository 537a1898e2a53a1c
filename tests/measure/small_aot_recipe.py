"""The dense recipe at reduced width, with the ``program`` of the real one."""

from dataclasses import replace
from pathlib import Path

from efftrain.models.config import llama
from efftrain.recipe import import_script

dense = import_script(Path(__file__).parents[2] / "recipes" / "dense.py")
program = dense.program
configs = {
    "cpu": replace(
        dense.configs["cpu"],
        model=llama(vocab_size=128, d_model=64, n_layers=2, n_heads=8, d_ff=64, max_length=32),
        training=replace(dense.configs["cpu"].training, batch_size=16, length=32, n_microbatches=1),
    )
}
