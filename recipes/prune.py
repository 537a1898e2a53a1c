"""Pruning: zeros while a model is trained, and structured cuts of a model that is trained.

    python data/python.py --out corpora/python
    python recipes/prune.py cpu                  # a dense run, and from its middle on half of its weights
    efftrain compress quantize runs/prune/sparse # stored without its zeros
    efftrain compress structured runs/prune/dense-seed0 --ratio 0.33 --recovery-tokens 400000  # smaller, faster
    python recipes/prune.py cpu --compare        # 2:4, magnitude, Wanda, SparseGPT, width, depth, rounds; three seeds

The dense run is beside the other, as dense-seedN; both share their first half. Zeros give fewer bytes on disk and no
speed, because JAX has no sparse products, neither for single zeros nor for 2:4. Cuts of width and depth give both.

A comparison writes ``comparison.json`` into the output folder; if it is interrupted, the same command continues it.

Measured: recipes/pruning.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from flax import nnx

import efftrain
from efftrain.code_identity import code_identity
from efftrain.compress.commands.prune import Prune
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.structured_prune import StructuredPrune
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.in_memory import prune_run
from efftrain.compress.pruning.sparsify import Sparsity
from efftrain.compress.pruning.sparsity_schedules import Gradual
from efftrain.compress.run import compress
from efftrain.config import digest
from efftrain.errors import ConfigError
from efftrain.experiment import presets
from efftrain.experiment.baseline import baseline, resume_from_baseline
from efftrain.experiment.compare import Comparison, compare, on_test
from efftrain.experiment.experiment import Experiment, finished, train_and_score
from efftrain.measure.cost.latency import side_by_side
from efftrain.measure.scorecard.scorecard import Scorecard, table
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.ops.masks import SemiStructured, Unstructured
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.program import Wrap
from efftrain.train.run.directory import load_model_config

STRUCTURES = {"half": Unstructured(sparsity=0.5), "2of4": SemiStructured(n=2, m=4)}
EVALUATED_ROWS = 1024  # rows of the test split
RECOVERY = 0.1  # share of the dense run's tokens on which a pruned model is trained
DENSE_STEPS = 0.5  # share of the steps that the dense run and the sparse ones have in common


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """A sparse run, which starts from the dense run beside it.

    Attributes:
      sparsity: which weights become zero, and when. None: only the dense run is trained.
      compare: train and prune in other ways too.
      seeds: seeds of a comparison.
    """

    sparsity: Sparsity | None = None
    corpus: Path = Path("corpora/python")
    out: Path = Path("runs/prune/sparse")
    compare: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)


cpu = Config(
    model=llama(vocab_size=4096, d_model=96, n_layers=6, n_heads=4, d_ff=288, max_length=512, tied_embedding=True),
    training=Training(
        steps=1000, batch_size=16, length=256, optimizer=AdamW(peak_lr=3e-3), checkpoint_every=100, keep_every=100
    ),
    sparsity=Sparsity(structure=Unstructured(sparsity=0.5), schedule=Gradual(start=DENSE_STEPS, end=0.75)),
)
gpu = replace(cpu, model=presets.llama_125m, training=replace(presets.gpu_training, keep_every=500))
configs = {"cpu": cpu, "gpu": gpu}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective, Wrap | None]:
    """The model, what is minimised, and the wrapper of the optimizer."""
    wrap = config.sparsity and config.sparsity.around(config.training)
    return lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss, wrap


def main(config: Config) -> Scorecard | Comparison:
    if config.compare:
        return compare_ways(config)
    config = replace(config, seeds=())
    ready = started(config)
    if ready.training.resume_from != config.training.resume_from:
        train(dense_run(config))
    card = train(ready)
    console.print(table([card]))
    return card


def train(config: Config, evaluated_rows: int | None = None) -> Scorecard:
    return train_and_score(config, *program(config), evaluated_rows=evaluated_rows)[1]


def dense_run(config: Config) -> Config:
    """The same model and seed, dense, beside the run."""
    return baseline(config, "dense", sparsity=None)


def started(config: Config) -> Config:
    """Adds the checkpoint of the dense run at which pruning starts."""
    if config.sparsity is None or config.training.resume_from is not None:
        return config
    if config.sparsity.schedule.start < DENSE_STEPS:
        raise ConfigError(
            f"pruning starts at {config.sparsity.schedule.start} of the steps, and the sparse run takes the first "
            f"{DENSE_STEPS} from the dense run; start it there or later"
        )
    return resume_from_baseline(config, dense_run(config), share=1 - DENSE_STEPS)


def compare_ways(config: Config) -> Comparison:
    """Trains sparse models, and prunes the dense runs in several ways; each with every seed."""
    if config.sparsity is None:
        raise ConfigError("--compare compares a dense run with sparse ones; give it a sparsity")
    base, out = replace(config, compare=False, seeds=()), config.out.parent
    pattern = replace(base.sparsity, structure=STRUCTURES["2of4"])
    variants = {"dense": dense_run(base), "sparse": base, "sparse-2of4": replace(base, sparsity=pattern)}
    found = compare(variants, train, out=out, seeds=config.seeds, complete=started)
    console.print(found.table())
    text = CorpusRows(base.corpus, base.training.length)
    seeds: dict[str, dict[str, object]] = {}
    with found.measuring(out, "cuts", code_identity(base, main)) as stores:
        for seed, store in stores.items():
            dense = out / f"dense-seed{seed}"
            pruned = {"dense": partial(efftrain.load, dense)} | {
                f"{name}, {method}": partial(prune_run, dense, text, structure, method)
                for name, structure in STRUCTURES.items()
                for method in ("magnitude", "wanda", "sparsegpt")
            }
            at_once = text.reporting(EVALUATED_ROWS).bits_per_byte(pruned, store)
            tuned = cut_and_tune(base, dense, seed)
            seeds[str(seed)] = {"at_once": at_once, "tuned": tuned}
            if len(seeds) == 1:
                name = f"latency {digest(tuned)}"
                seeds[str(seed)]["latency"] = store.cell(name, lambda dense=dense, seed=seed: latencies(dense, seed))
        found.write(out / "comparison.json", seeds=seeds)
    return found


def cuts(config: Config) -> dict[str, Prune | StructuredPrune]:
    """How a dense run is pruned before it is trained on a tenth of its tokens."""
    tokens = round(RECOVERY * config.training.tokens)
    once, twice, thrice = (RecoveryTraining(tokens=tokens, rounds=rounds) for rounds in (1, 2, 3))
    return {
        "magnitude": Prune(sparsity="0.5", method="magnitude", recovery=once),
        "magnitude-3rounds": Prune(sparsity="0.5", method="magnitude", recovery=thrice),
        "width33": StructuredPrune(ratio=0.33, recovery=once),
        "depth28": StructuredPrune(ratio=0.28, axis="depth", recovery=once),  # two of the six layers of cpu
        "width50-2rounds": StructuredPrune(ratio=0.5, recovery=twice),
    }


def cut_and_tune(config: Config, dense: Path, seed: int) -> dict[str, dict[str, float]]:
    """Figures of each pruned and trained model, and of the smaller shape trained on those tokens alone."""
    cards = {}
    for name, options in cuts(config).items():
        cut = dense.with_name(f"{name}-seed{seed}")
        console.print(f"{name}, seed {seed}", markup=False)
        cards[name] = compress(dense, options, out=cut, evaluated_rows=EVALUATED_ROWS)
        if name == "width33":
            cards["width33-scratch"] = from_scratch(config, cut, seed)
    kept = ("bpb", "parameters_total", "train_flops")
    return {name: {figure: card.figures[figure].value for figure in kept} for name, card in cards.items()}


def from_scratch(config: Config, cut: Path, seed: int) -> Scorecard:
    """Trains the shape of a pruned model from random parameters, on as many tokens as the pruned one got."""
    steps = round(RECOVERY * config.training.steps)
    training = replace(config.training, seed=seed, steps=steps, keep_every=None, finetune=None)
    scratch = replace(config, model=load_model_config(cut), training=training, sparsity=None)
    scratch = replace(scratch, out=cut.with_name(f"{cut.name}-scratch"))
    return on_test(finished(scratch) or train(scratch, EVALUATED_ROWS), scratch, rows=EVALUATED_ROWS)


def latencies(dense: Path, seed: int) -> dict[str, dict[str, float]]:
    """Seconds for a prompt of 128 tokens and for each new token, with one row and with eight."""
    cut = {name: dense.with_name(f"{name}-seed{seed}") for name in ("width33", "depth28", "width50-2rounds")}
    models = {name: efftrain.load(run) for name, run in {"dense": dense, **cut}.items()}
    prompt, n_new = (min(n, models["dense"].config.max_length // 2) for n in (128, 64))
    return side_by_side(models, prompt_length=prompt, n_new=n_new)


if __name__ == "__main__":
    run_recipe(main, configs)
