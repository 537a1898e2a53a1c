"""Training for quantisation: the last tenth of a float run again, with matrices as they will be stored in 4 bits.

    python data/python.py --out corpora/python
    python recipes/qat.py cpu                    # a float run, and from its last tenth on 4 bits
    efftrain compress quantize runs/qat/int4     # stored in 4 bits, bit by bit what was trained
    python recipes/qat.py cpu --compare          # beside rounding, GPTQ, AWQ, 8 bits, quantised caches; three seeds
    python recipes/qat.py v5e-64 --corpus corpora/python    # on every worker of a TPU slice

The float run is beside the other, as float-seedN; it is the baseline too, on the same tokens. ``--start beginning``
trains for quantisation from the first step, ``--start finish`` in a short run after the end of the float run (whose
FLOPs and tokens are then those of the short run).

A comparison writes ``comparison.json`` into the output folder; if it is interrupted, the same command continues it.

Measured: recipes/quantization.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from flax import nnx

import efftrain
from efftrain.code_identity import code_identity
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.in_memory import convert_run
from efftrain.compress.quantization.convert import Method
from efftrain.experiment import presets
from efftrain.experiment.baseline import baseline, resume_from_baseline
from efftrain.experiment.compare import Comparison, compare
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.scorecard.scorecard import Scorecard, table
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization, QuantizationRule, give_rules
from efftrain.ops.number_formats import Integer
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective, SelfDistillation, next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.schedules import Cosine

EVALUATED_ROWS = 2048  # rows of the test split for conversions; a trained run is evaluated on all rows
FINISH_SHARE, FINISH_LR = 0.05, 0.05  # shares of the float run's steps and peak learning rate, for start "finish"


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """A run for quantisation.

    Attributes:
      start: where training sees quantised numbers: in the last part of the float run ("end"), from the beginning, or in
        a short run of its own after the float run ("finish").
      share: for start "end", the share of the steps that see quantised numbers; the float run must keep a checkpoint
        where they begin. While the learning rate is still high, matrices jump between levels, so that the whole decay
        (0.2) is worse than its second half.
      distillation: also train towards the output of the float matrices. None: train on the text only.
      compare: train and convert in other ways too.
      seeds: seeds of a comparison.
    """

    start: Literal["end", "beginning", "finish"] = "end"
    share: float = 0.1
    distillation: SelfDistillation | None = None
    corpus: Path = Path("corpora/python")
    out: Path = Path("runs/qat/int4")
    compare: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)


def quantization(weights: Integer | None, activations: Integer | None = None, **changes) -> Quantization:
    """Quantises the matrices of all blocks; embedding, head, norms and routers stay float."""
    rule = QuantizationRule(layers="blocks/.*", weights=weights, activations=activations, **changes)
    return Quantization(rules=(rule,))


int8, int4 = Integer(bits=8), Integer(bits=4, group=32)
four_bits = quantization(int4, learned_step=True)

small = llama(vocab_size=4096, d_model=64, n_layers=4, n_heads=2, d_ff=256, max_length=512, tied_embedding=True)
cpu = Config(
    model=small.replace(quantization=four_bits),
    training=Training(
        steps=2000, batch_size=16, length=256, optimizer=AdamW(peak_lr=3e-3), checkpoint_every=200, keep_every=600
    ),
)
gpu = replace(
    cpu,
    model=presets.llama_125m.replace(quantization=four_bits),
    training=replace(presets.gpu_training, keep_every=1500),
)
v5e_64 = replace(
    cpu,
    model=presets.llama_1b.replace(quantization=four_bits),
    training=replace(presets.v5e_64_training, keep_every=6000),
)
configs = {"cpu": cpu, "gpu": gpu, "v5e-64": v5e_64}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective]:
    """The model and what is minimised: what ``fit`` trains, and what ``efftrain aot`` compiles."""
    return lambda rngs: Decoder(config.model, rngs=rngs), config.distillation or next_token_loss


def main(config: Config) -> Scorecard | Comparison:
    if config.compare:
        return compare_formats(config)
    config = replace(config, seeds=())
    ready = started(config)
    if begins_in_float(config):
        train(float_run(config))
    card = train(ready)
    console.print(table([card]))
    return card


def train(config: Config) -> Scorecard:
    finishes = begins_in_float(config) and config.start == "finish"
    source = float_run(config).out if finishes else None

    def float_model() -> Decoder:
        model = efftrain.load(source)
        give_rules(model, config.model.quantization)
        return model

    return train_and_score(config, *program(config), initial=float_model if finishes else None, source=source)[1]


def begins_in_float(config: Config) -> bool:
    """Whether the run starts from the float run beside it."""
    return config.model.quantization != Quantization() and config.start != "beginning"


def float_run(config: Config) -> Config:
    """The same model and seed without quantisation, beside the run."""
    plain = config.model.replace(quantization=Quantization())
    return baseline(config, "float", model=plain, start="beginning", share=Config.share, distillation=None)


def started(config: Config) -> Config:
    """Adds what depends on the float run: the checkpoint to resume from, or a short schedule after its end."""
    training = config.training
    if not begins_in_float(config) or training.resume_from is not None:
        return config
    if config.start == "end":
        return resume_from_baseline(config, float_run(config), share=config.share)
    steps = max(round(FINISH_SHARE * training.steps), 1)
    optimizer = replace(training.optimizer, peak_lr=FINISH_LR * training.optimizer.peak_lr)
    short = replace(training, steps=steps, optimizer=optimizer, schedule=Cosine(warmup=0.04, final=0.0), finetune=None)
    return replace(config, training=short)


def compare_formats(config: Config) -> Comparison:
    """Trains for several formats, and converts the float runs in several ways; each with every seed."""
    base = replace(config, compare=False, seeds=())
    out, weights = config.out.parent, config.model.quantization.rules[0].weights
    fixed_steps = replace(base, model=base.model.replace(quantization=quantization(weights)))
    variants = {"float": float_run(base), "int4": base, "int4-fixed-steps": fixed_steps}
    found = compare(variants, train, out=out, seeds=config.seeds, complete=started)
    console.print(found.table())
    text = CorpusRows(config.corpus, config.training.length)
    evaluated = text.reporting(EVALUATED_ROWS)
    with found.measuring(out, "conversions", code_identity(base, main)) as stores:
        conversions = [
            evaluated.bits_per_byte(conversions_of(out, seed, weights, text), store) for seed, store in stores.items()
        ]
        costs = {name: [of[name] / of["float"] - 1 for of in conversions] for name in conversions[0]}
        found.write(out / "comparison.json", conversions=conversions, cost_share=costs)
    return found


def conversions_of(out: Path, seed: int, weights: Integer, text: CorpusRows) -> dict[str, Callable[[], Decoder]]:
    """Functions that convert the float model of a seed in several ways, and the trained ones as they were trained."""

    def way(variant: str, *how: Quantization | Method) -> Callable[[], Decoder]:
        return partial(convert_run, out / f"{variant}-seed{seed}", text, *how)

    return {
        "float": way("float"),
        "int8": way("float", quantization(int8)),
        "int8, int8 activations": way("float", quantization(int8, int8)),
        "int8 cache": way("float", Quantization(cache=int8)),
        "int4 cache": way("float", Quantization(cache=Integer(bits=4))),
        "int4": way("float", quantization(weights)),
        "int4, gptq": way("float", quantization(weights), "gptq"),
        "int4, awq": way("float", quantization(weights), "awq"),
        "trained int4": way("int4"),
        "trained int4-fixed-steps": way("int4-fixed-steps"),
    }


if __name__ == "__main__":
    run_recipe(main, configs)
