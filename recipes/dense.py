"""A dense decoder (Llama's shape), the baseline of every other recipe.

    python data/python.py --out corpora/python
    python recipes/dense.py cpu --corpus corpora/python
    python recipes/dense.py gpu --corpus corpora/python --training.steps 5000
    python recipes/dense.py v5e-64 --corpus corpora/python          # on every worker of a TPU slice

Of several processes (``sharding.hosts``) each feeds its part of the batches, and the first one writes the run.

Measured, cpu: 1.788 bits per byte on validation (427 batches), 3,050 tokens/s at the median step, 1.25 GB peak memory;
one run on two cores of an AMD EPYC, beside other work. gpu, v5e-64: not measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

from efftrain import data
from efftrain.measure.evaluate import Evaluator
from efftrain.measure.flops import training_flops
from efftrain.measure.parameters import abstract_decoder
from efftrain.measure.score import score
from efftrain.measure.scorecard import FILE_NAME, Scorecard, table
from efftrain.models.config import ModelConfig, llama
from efftrain.models.decoder import Decoder
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.sharding import hosts
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.loop import Training, batch_part, fit
from efftrain.train.objective import Objective, next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.run import Run


@dataclass(frozen=True, kw_only=True)
class Config:
    """A dense run.

    Attributes:
      corpus: a folder that a script under data/ made.
      out: the run directory; the same command continues what it finds there.
    """

    model: ModelConfig
    training: Training
    corpus: Path = Path("corpora/python")
    out: Path = Path("runs/dense")


cpu = Config(
    model=llama(vocab_size=4096, d_model=256, n_layers=6, n_heads=4, d_ff=688, max_length=512, tied_embedding=True),
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
gpu = replace(  # about 125M parameters
    cpu,
    model=llama(
        vocab_size=4096,
        d_model=768,
        n_layers=16,
        n_heads=12,
        d_ff=2304,
        max_length=2048,
        tied_embedding=True,
        dtype="bfloat16",
    ),
    training=replace(
        cpu.training,
        steps=5000,
        batch_size=64,
        length=2048,
        n_microbatches=1,
        optimizer=AdamW(peak_lr=1.5e-3),
        eval_every=500,
        checkpoint_every=500,
    ),
)
v5e_64 = replace(  # about 1B parameters
    gpu,
    model=llama(
        vocab_size=4096,
        d_model=2048,
        n_layers=20,
        n_heads=16,
        n_kv_heads=8,
        d_ff=5632,
        max_length=2048,
        dtype="bfloat16",
        scan=True,
        remat="full",
    ),
    training=replace(
        gpu.training,
        steps=20_000,
        batch_size=512,
        optimizer=AdamW(peak_lr=6e-4),
        mesh=MeshConfig(fsdp=-1),
    ),
)
configs = {"cpu": cpu, "gpu": gpu, "v5e-64": v5e_64}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective]:
    """The model and what is minimised: what ``fit`` trains, and what ``efftrain aot`` compiles."""
    return lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss


def main(config: Config) -> Scorecard:
    hosts.connect()
    with hosts.together():
        corpus = data.open(config.corpus)
        corpus.check_model(config.model.vocab_size)
    run = Run(config.out, config)
    training = config.training

    loader = data.LoaderConfig(
        corpora=(data.Part(path=config.corpus),),
        length=training.length,
        batch_size=training.batch_size,
        seed=training.seed,
    )
    data.show_mixture(loader, training.tokens)
    held_out = replace(loader, split="validation", shuffle=False, repeat=False)
    part = batch_part(training)
    evaluator = Evaluator(lambda: data.batches(held_out, *part, verify=False), corpus.token_bytes())

    fitted = fit(
        *program(config),
        data.batches(loader, *part, verify=False),
        training,
        run,
        evaluate=evaluator,
        flops_per_token=training_flops(abstract_decoder(config.model), training.length),
    )
    card = score(
        fitted.model,
        name=run.path.name,
        length=training.length,
        quality=fitted.evaluation,
        training_tokens=training.tokens,
        training_figures=fitted.figures,
        checkpoint=run.checkpoints / str(training.steps),
    )
    if hosts.process_index() == 0:
        card.write(run.path / FILE_NAME)
    console.print(table([card]))
    return card


if __name__ == "__main__":
    run_recipe(main, configs)
