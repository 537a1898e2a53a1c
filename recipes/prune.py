"""Pruning: zeros while a model is trained, and what can be cut out of one that is trained.

    python data/python.py --out corpora/python
    python recipes/prune.py cpu                  # a dense run, and from its middle on half of its weights
    efftrain compress quantize runs/prune/sparse # stored without its zeros
    efftrain compress structured runs/prune/dense-seed0 --ratio 0.33 --recovery-tokens 400000  # smaller, faster
    python recipes/prune.py cpu --compare        # 2:4, magnitude, Wanda, SparseGPT, width, depth, rounds; three seeds

The dense run stands beside the other, as dense-seedN; both share their first half. Zeros bring fewer bytes on disk and
no speed: JAX has no sparse products, neither for single zeros nor for 2:4. Cuts of width and depth bring both.

A comparison leaves ``comparison.json`` in the output folder; when interrupted it continues.

Measured, cpu: bits per byte above the dense run's, three seeds (2 cores of an Intel Xeon;
tests/bench/results/prune_quality.json): on the same 4.1 M tokens half of the weights 1.41, 0.99, 1.85 %, 2:4
1.50, 1.13, 2.06 %. At once, without training: magnitude 2.58, 2.30, 3.05 %, Wanda 2.81, 2.54, 3.26 %, SparseGPT
1.24, 1.39, 1.55 %. Behind a tenth of the tokens: magnitude 0.30, 0.41, 0.32 %, in three rounds 1.63, 1.81, 1.76 %; a
third less in width 2.28, 2.61, 2.45 %, that shape from scratch 57.21, 55.04, 62.40 %; four of six layers
4.30, 4.04, 7.53 %; half in width, in two rounds, 9.11, 9.31, 9.80 %. gpu: not measured; it compiles for v5e.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx

import efftrain
from efftrain.code_identity import code_identity
from efftrain.compress.commands.compression import AnyPrune
from efftrain.compress.commands.prune import Prune
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.structured_prune import StructuredPrune
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.pruning.one_shot import prune
from efftrain.compress.pruning.sparsify import Sparsity
from efftrain.compress.pruning.sparsity_schedules import Gradual
from efftrain.compress.run import compress
from efftrain.config import digest, finite_json
from efftrain.errors import ConfigError
from efftrain.experiment.compare import Comparison, compare
from efftrain.experiment.experiment import Experiment, finished, reported, train_and_score
from efftrain.measure.cost.latency import measure_latency
from efftrain.measure.measurements import Measurements
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

EVALUATED_ROWS, CALIBRATION_ROWS = 1024, 128  # of the test and of the training split
RECOVERY = 0.1  # of the dense run's tokens
DENSE_STEPS = 0.5  # share of the steps that the dense run and the sparse ones have in common


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """A sparse run, which begins as the dense one beside it.

    Attributes:
      sparsity: what goes, and when; None trains the dense run alone.
      compare: train and prune in other ways too.
      seeds: of a comparison.
    """

    sparsity: Sparsity | None = None
    corpus: Path = Path("corpora/python")
    out: Path = Path("runs/prune/sparse")
    compare: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)


gradual = Sparsity(
    structure=Unstructured(sparsity=0.5),
    schedule=Gradual(start=DENSE_STEPS, end=0.75),
)

cpu = Config(
    model=llama(vocab_size=4096, d_model=96, n_layers=6, n_heads=4, d_ff=288, max_length=512, tied_embedding=True),
    training=Training(
        steps=1000,
        batch_size=16,
        length=256,
        optimizer=AdamW(peak_lr=3e-3),
        checkpoint_every=100,
        keep_every=100,
    ),
    sparsity=gradual,
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
        optimizer=AdamW(peak_lr=1.5e-3),
        eval_every=500,
        checkpoint_every=500,
        keep_every=500,
    ),
)
configs = {"cpu": cpu, "gpu": gpu}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective, Wrap | None]:
    """The model, what is minimised, and what stands around the optimizer."""
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


def train(config: Config) -> Scorecard:
    return train_and_score(config, *program(config))[1]


def dense_run(config: Config) -> Config:
    """The same model and seed, dense, beside the run."""
    training = replace(config.training, resume_from=None, resume_schedule=None)
    return replace(config, training=training, sparsity=None, out=config.out.with_name(f"dense-seed{training.seed}"))


def started(config: Config) -> Config:
    """With the checkpoint of the dense run at which pruning starts."""
    training = config.training
    if config.sparsity is None or training.resume_from is not None:
        return config
    step = round(DENSE_STEPS * training.steps)
    if config.sparsity.schedule.start < DENSE_STEPS:
        raise ConfigError(
            f"pruning starts at {config.sparsity.schedule.start} of the steps, of which the dense run shares the first "
            f"{DENSE_STEPS}; start it there or later"
        )
    if training.keep_every is None or step % training.keep_every:
        raise ConfigError(
            f"pruning begins behind step {step}, of which the dense run keeps no checkpoint; set training.keep-every "
            f"and training.checkpoint-every to divisors of {step}"
        )
    return replace(config, training=replace(training, resume_from=f"{dense_run(config).out}@{step}", finetune=None))


def compare_ways(config: Config) -> Comparison:
    """Sparse training, and what can be done to the dense runs; each with every seed."""
    if config.sparsity is None:
        raise ConfigError("--compare compares a dense run with sparse ones; give it a sparsity")
    base, out = replace(config, compare=False, seeds=()), config.out.parent
    variants = {
        "dense": dense_run(base),
        "sparse": base,
        "sparse-2of4": replace(base, sparsity=replace(base.sparsity, structure=SemiStructured(n=2, m=4))),
    }
    found = compare(variants, train, out=out, seeds=config.seeds, complete=started)
    console.print(found.table())
    seeds: dict[str, Any] = {}
    measured = []
    for i, seed in enumerate(config.seeds):
        dense = out / f"dense-seed{seed}"
        made_from = {"dense": digest(asdict(found.cards["dense"][i]))}
        kept = Measurements(out / f"cuts-seed{seed}.json", made_from, code_identity(base, main))
        at_once = kept.cell("at once", lambda dense=dense: prune_at_once(base, dense))
        measured.append(kept)
        tuned = cut_and_tune(base, dense, seed)
        seeds[str(seed)] = {"at_once": at_once, "tuned": tuned}
        if i == 0:
            name = f"latency {digest(tuned)}"  # of the models that were cut
            seeds[str(seed)]["latency"] = kept.cell(name, lambda dense=dense: side_by_side(dense))
    found.write(out / "comparison.json", seeds=seeds)
    for kept in measured:
        kept.remove()
    console.print(json.dumps(finite_json(seeds), indent=1))
    return found


def prune_at_once(config: Config, dense: Path) -> dict[str, float]:
    """Bits per byte on some rows, without training behind the cut."""
    text = CorpusRows(config.corpus, config.training.length)
    evaluate, calibration = text.reporting(EVALUATED_ROWS).evaluator(), text.calibration(CALIBRATION_ROWS)
    found = {"dense": evaluate(efftrain.load(dense))["bpb"]}
    for name, structure in {"half": Unstructured(sparsity=0.5), "2of4": SemiStructured(n=2, m=4)}.items():
        for method in ("magnitude", "wanda", "sparsegpt"):
            model, _ = prune(LayerwiseModel.read(dense), structure, method=method, calibration=calibration)
            found[f"{name}, {method}"] = evaluate(model)["bpb"]
    return found


def cuts(config: Config) -> dict[str, AnyPrune]:
    """What is done to a dense run, which is trained for a tenth of its tokens behind that."""
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
    """What each cut came to, and a model of such a shape trained on those tokens alone."""
    found = {}
    for name, options in cuts(config).items():
        cut = dense.with_name(f"{name}-seed{seed}")
        console.print(f"{name}, seed {seed}", markup=False)
        found[name] = figures(compress(dense, options, out=cut, evaluated_rows=EVALUATED_ROWS))
        if name == "width33":
            found["width33-scratch"] = figures(from_scratch(config, cut, seed))
    return found


def from_scratch(config: Config, cut: Path, seed: int) -> Scorecard:
    """The shape of a model that was cut, trained on as many tokens as were spent behind the cut."""
    steps = round(RECOVERY * config.training.steps)
    training = replace(config.training, seed=seed, steps=steps, keep_every=None, finetune=None)
    out = cut.with_name(f"{cut.name}-scratch")
    scratch = replace(config, model=load_model_config(cut), training=training, sparsity=None, out=out)
    card = finished(scratch) or train_and_score(scratch, *program(scratch), evaluated_rows=EVALUATED_ROWS)[1]
    return reported(card, scratch.out, scratch.corpus, training, rows=EVALUATED_ROWS)


def figures(card: Scorecard) -> dict[str, float]:
    return {name: card.figures[name].value for name in ("bpb", "parameters_total", "train_flops")}


def side_by_side(dense: Path) -> dict[str, dict[str, float]]:
    """Seconds for a prompt of 128 tokens and for a token, one row and eight: medians of rounds that alternate."""
    seed = dense.name.removeprefix("dense-seed")
    runs = {"dense": dense} | {
        name: dense.with_name(f"{name}-seed{seed}") for name in ("width33", "depth28", "width50-2rounds")
    }
    models, times = {name: efftrain.load(run) for name, run in runs.items()}, {}
    prompt, n_new = (min(n, models["dense"].config.max_length // 2) for n in (128, 64))
    for _ in range(5):
        for name, model in models.items():
            for batch in (1, 8):
                read, draw = measure_latency(model, batch=batch, prompt_length=prompt, n_new=n_new, rounds=3)
                times.setdefault(name, {}).setdefault(f"prefill_s_b{batch}", []).append(read.median_s)
                times[name].setdefault(f"decode_s_per_token_b{batch}", []).append(draw.s_per_token)
    return {name: {f: statistics.median(values) for f, values in found.items()} for name, found in times.items()}


if __name__ == "__main__":
    run_recipe(main, configs)
