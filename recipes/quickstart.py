"""From raw text to a measured model in a few minutes on two CPU cores, without network.

    python recipes/quickstart.py [--out runs/quickstart]

Builds a corpus from the Python standard library, trains a tokenizer and a small decoder, measures it in bits per byte
on packages that it has not seen, lets it continue a function, and leaves a run directory with a scorecard. If it is
interrupted, the same command continues it.

Measured: recipes/README.md.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx

from efftrain.data import Corpus
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.scorecard.scorecard import Scorecard, table
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import generate
from efftrain.models.decoding.sampling import Sampling
from efftrain.progress import console
from efftrain.recipe import import_script, run_recipe
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.optimizers import AdamW

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "def read_json(path):\n"
DRAWS = 8  # number of continuations; the best one is shown


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """The quickstart.

    Attributes:
      corpus: folder in which the corpus is built, or found if it was built before.
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
    if written := max(map(python_code, samples(model, corpus)), key=len):
        console.print(f"text from the model, the longest Python of {DRAWS} samples:\n{written}", markup=False)
    console.print(table([card]))
    return card


def samples(model: Decoder, corpus: Corpus) -> list[str]:
    """Texts that start with ``PROMPT`` and continue it."""
    tokenizer = corpus.tokenizer()
    prompt = [corpus.end_of_text_id, *tokenizer.encode(PROMPT, add_special_tokens=False).ids]
    sampling = Sampling(temperature=0.5, top_k=40)
    drawn = generate(model, [prompt] * DRAWS, n_new=64, sampling=sampling, key=jax.random.key(0))
    return [PROMPT + tokenizer.decode(row) for row in drawn.tolist()]


def python_code(text: str) -> str:
    """The longest start of a text that Python can parse and that continues ``PROMPT``; "" if there is none."""
    lines = text.splitlines(keepends=True)[:-1]  # the last one was cut off
    for n in range(len(lines), 1, -1):
        try:
            ast.parse(found := "".join(lines[:n]))
        except (SyntaxError, ValueError):
            continue
        return found.rstrip()
    return ""


if __name__ == "__main__":
    run_recipe(main, configs)
