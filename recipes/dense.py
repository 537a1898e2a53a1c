"""A dense decoder (Llama's shape), the baseline of every other recipe.

    python data/python.py --out corpora/python
    python recipes/dense.py cpu --corpus corpora/python
    python recipes/dense.py gpu --corpus corpora/python --training.steps 5000
    python recipes/dense.py v5e-64 --corpus corpora/python          # on every worker of a TPU slice

With several processes (``sharding.hosts``), each feeds its part of the batches, and the first one writes the run.
Measured: recipes/README.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

from efftrain.experiment import presets
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.scorecard.scorecard import Scorecard, table
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.optimizers import AdamW


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """A dense run."""

    corpus: Path = Path("corpora/python")
    out: Path = Path("runs/dense")


cpu = Config(
    model=llama(vocab_size=4096, d_model=256, n_layers=6, n_heads=4, d_ff=704, max_length=512, tied_embedding=True),
    training=Training(
        steps=600,
        batch_size=16,
        length=256,
        n_microbatches=4,
        optimizer=AdamW(peak_lr=3e-3),
        eval_every=300,
        checkpoint_every=100,
    ),
)
gpu = replace(cpu, model=presets.llama_125m, training=presets.gpu_training)
v5e_64 = replace(cpu, model=presets.llama_1b, training=presets.v5e_64_training)
configs = {"cpu": cpu, "gpu": gpu, "v5e-64": v5e_64}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective]:
    """The model and what is minimised: what ``fit`` trains, and what ``efftrain aot`` compiles."""
    return lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss


def main(config: Config) -> Scorecard:
    _, card = train_and_score(config, *program(config))
    console.print(table([card]))
    return card


if __name__ == "__main__":
    run_recipe(main, configs)
