"""A recipe with a command line, whose programs are kept between processes. Started by test_compilation_cache.py."""

from dataclasses import dataclass
from pathlib import Path

import jax
import tiny

from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.recipe import run_recipe
from efftrain.train.config import Training
from efftrain.train.loop import fit
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.run.directory import Run


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig
    training: Training
    out: Path = Path("runs/cached")


configs = {"tiny": Config(model=tiny.MODEL, training=tiny.TRAINING)}


def main(config: Config) -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # so small a program is not kept otherwise
    run = Run(config.out, config)
    fit(lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss, tiny.Walks(), config.training, run)


if __name__ == "__main__":
    run_recipe(main, configs)
