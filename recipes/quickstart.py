"""From raw text to a measured model in a few minutes on two CPU cores, without network.

    python recipes/quickstart.py [--out runs/quickstart]

Builds a corpus from the Python standard library, trains a tokenizer and a small decoder, measures it in bits per byte
on packages that it has not seen, decodes a sample, and leaves a run directory with a scorecard. A second start
continues where the first stopped.

Measured: bpb 1.95 on validation, 282 s with the corpus, 6,300 tokens/s; one run on two cores of an AMD EPYC.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from efftrain.data import Corpus
from efftrain.measure.experiment import Experiment, train_and_score
from efftrain.measure.scorecard import Scorecard, table
from efftrain.models.config import llama
from efftrain.models.decode import generate
from efftrain.models.decoder import Decoder
from efftrain.models.sampling import Sampling
from efftrain.progress import console
from efftrain.recipe import import_script, run_recipe
from efftrain.train.loop import Training
from efftrain.train.objective import Objective, next_token_loss
from efftrain.train.optimizers import AdamW

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "def read_json(path):\n"


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """The quickstart.

    Attributes:
      corpus: where the corpus is built, or found from an earlier start.
    """

    corpus: Path = Path("corpora/standard-library")
    out: Path = Path("runs/quickstart")


configs = {
    "cpu": Config(
        model=llama(vocab_size=4096, d_model=192, n_layers=4, n_heads=4, d_ff=512, max_length=256, tied_embedding=True),
        training=Training(
            steps=600,
            batch_size=16,
            length=128,
            n_microbatches=2,
            optimizer=AdamW(peak_lr=5e-3),
            eval_every=300,
            checkpoint_every=100,
        ),
    )
}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective]:
    """The model and what is minimised: what ``fit`` trains, and what ``efftrain aot`` compiles."""
    return lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss


def main(config: Config) -> Scorecard:
    python = import_script(ROOT / "data" / "python.py")
    corpus = python.main(python.Config(out=config.corpus, standard_library_only=True, processes=1))
    model, card = train_and_score(config, *program(config))
    console.print(sample(model, corpus), markup=False)
    console.print(table([card]))
    return card


def sample(model: Decoder, corpus: Corpus) -> str:
    """A continuation of ``PROMPT``."""
    tokenizer = corpus.tokenizer()
    prompt = [corpus.end_of_text_id, *tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    drawn = generate(
        model,
        jnp.array([prompt]),
        jnp.array([len(prompt)]),
        n_new=96,
        sampling=Sampling(temperature=0.7, top_k=40),
        key=jax.random.key(0),
    )
    return PROMPT + tokenizer.decode(drawn[0].tolist())


if __name__ == "__main__":
    run_recipe(main, configs)
