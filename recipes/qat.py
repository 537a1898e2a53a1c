"""Training for quantisation: the last tenth of a float run again, with matrices as they will be stored in 4 bits.

    python data/python.py --out corpora/python
    python recipes/qat.py cpu                    # a float run, and from its last tenth on 4 bits
    efftrain compress quantize runs/qat/int4     # stored in 4 bits, bit by bit what was trained
    python recipes/qat.py cpu --compare          # beside rounding, GPTQ, AWQ, 8 bits, quantised caches; three seeds
    python recipes/qat.py v5e-64 --corpus corpora/python    # on every worker of a TPU slice

The float run stands beside the other, as float-seedN; it is the baseline too, on the same tokens. ``--start beginning``
trains for quantisation from the first step, ``--start finish`` briefly behind the end of the float run (its FLOPs and
tokens are those of the short run).

A comparison leaves ``comparison.json`` in the output folder; when interrupted it continues.

Measured, cpu: bits per byte above the float run's on the same 8 M tokens, three seeds (2 cores of an Intel Xeon;
tests/bench/results/quantize_quality.json): 4 bits by rounding 0.70, 1.17, 1.38 %; GPTQ 0.43, 0.64, 0.77 %; AWQ, as
it was before it clipped weights, 0.77, 1.18, 1.52 %; trained 0.26, 0.33, 0.41 %, with fixed steps 0.29, 0.39, 0.43 %.
8 bits 0.01 %, with activations 0.02 %; the cache in 8 bits 0.00 %, in 4 bits 0.55 to 1.11 %. Seed 0, fixed steps:
training over the last fifth makes good 41 % of what rounding costs, over the last tenth 58 %, the last twentieth 54 %.
With the float matrices as teacher, over the last fifth, it costs twice as much as without. gpu, v5e-64: not measured;
they compile for v5e.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flax import nnx

import efftrain
from efftrain.code_identity import code_identity
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.quantization.convert import Method, convert
from efftrain.config import digest, finite_json
from efftrain.errors import ConfigError
from efftrain.experiment.compare import Comparison, compare
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.cost.flops import FORWARD_AND_BACKWARD, training_flops
from efftrain.measure.measurements import Measurements
from efftrain.measure.scorecard.scorecard import Scorecard, table
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.quantization import Quantization, QuantizationRule, give_rules
from efftrain.ops.number_formats import Integer
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.config import Training, parse_resume_from
from efftrain.train.objectives.objective import Objective, SelfDistillation, next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.schedules import Cosine

EVALUATED_ROWS = 2048  # of the test split, for conversions; a trained run is evaluated on all of it
FINISH_SHARE, FINISH_LR = 0.05, 0.05  # of the float run's steps and peak learning rate, for start "finish"


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """A run for quantisation.

    Attributes:
      start: where training sees quantised numbers: in the last part of the float run, from the beginning, or in a short
        run of its own behind the float run.
      share: of the steps, for start "end"; the float run keeps a checkpoint where it begins. While the learning rate is
        still high, matrices jump between levels: the whole decay (0.2) is worse than its second half.
      distillation: also keep close to the float matrices' output. None: only the text counts.
      compare: train and convert in other ways too.
      seeds: of a comparison.
    """

    start: Literal["end", "beginning", "finish"] = "end"
    share: float = 0.1
    distillation: SelfDistillation | None = None
    corpus: Path = Path("corpora/python")
    out: Path = Path("runs/qat/int4")
    compare: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)


def quantization(weights: Integer | None, activations: Integer | None = None, **changes) -> Quantization:
    """Of the matrices of all blocks; embedding, head, norms and routers stay float."""
    rule = QuantizationRule(layers="blocks/.*", weights=weights, activations=activations, **changes)
    return Quantization(rules=(rule,))


int8, int4 = Integer(bits=8), Integer(bits=4, group=32)
four_bits = quantization(int4, learned_step=True)

cpu = Config(
    model=llama(
        vocab_size=4096,
        d_model=64,
        n_layers=4,
        n_heads=2,
        d_ff=256,
        max_length=512,
        tied_embedding=True,
        quantization=four_bits,
    ),
    training=Training(
        steps=2000,
        batch_size=16,
        length=256,
        optimizer=AdamW(peak_lr=3e-3),
        checkpoint_every=200,
        keep_every=600,
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
        quantization=four_bits,
    ),
    training=replace(
        cpu.training,
        steps=5000,
        batch_size=64,
        length=2048,
        optimizer=AdamW(peak_lr=1.5e-3),
        eval_every=500,
        checkpoint_every=500,
        keep_every=1500,
    ),
)
v5e_64 = replace(
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
        quantization=four_bits,
    ),
    training=replace(
        gpu.training,
        steps=20_000,
        batch_size=512,
        keep_every=6000,
        optimizer=AdamW(peak_lr=6e-4),
        mesh=MeshConfig(replica=-1, fsdp=16),
    ),
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
    if is_quantized(config) and config.start != "beginning":
        train(float_run(config))
    card = train(ready)
    console.print(table([card]))
    return card


def train(config: Config) -> Scorecard:
    def finished_float() -> Decoder:
        model = efftrain.load(float_run(config).out)
        give_rules(model, config.model.quantization)
        return model

    behind = is_quantized(config) and config.start == "finish"
    initial = finished_float if behind else None
    source = float_run(config).out if behind else None
    extra = teacher_flops(config)
    return train_and_score(config, *program(config), initial=initial, source=source, extra_flops=extra)[1]


def teacher_flops(config: Config) -> float:
    """Of the float matrices' pass, forward only, for a token of the run; before ``resume_from`` there was none."""
    training = config.training
    if config.distillation is None:
        return 0.0
    before = 0 if training.resume_from is None else parse_resume_from(training.resume_from, training.steps)[1]
    forward = training_flops(abstract_decoder(config.model), training.length) / FORWARD_AND_BACKWARD
    return forward * (1 - before / training.steps)


def is_quantized(config: Config) -> bool:
    return config.model.quantization != Quantization()


def float_run(config: Config) -> Config:
    """The same model and seed without quantisation, beside the run."""
    return replace(
        config,
        model=config.model.replace(quantization=Quantization()),
        training=replace(config.training, resume_from=None, resume_schedule=None),
        start="beginning",
        share=Config.share,
        distillation=None,
        out=config.out.with_name(f"float-seed{config.training.seed}"),
    )


def started(config: Config) -> Config:
    """With what depends on the float run: the checkpoint to resume from, or a schedule behind its end."""
    training = config.training
    if not is_quantized(config) or config.start == "beginning" or training.resume_from is not None:
        return config
    if config.start == "end":
        checkpoint = f"{float_run(config).out}@{first_step(config)}"
        return replace(config, training=replace(training, resume_from=checkpoint, finetune=None))
    steps = max(round(FINISH_SHARE * training.steps), 1)
    optimizer = replace(training.optimizer, peak_lr=FINISH_LR * training.optimizer.peak_lr)
    short = replace(training, steps=steps, optimizer=optimizer, schedule=Cosine(warmup=0.04, final=0.0), finetune=None)
    return replace(config, training=short)


def first_step(config: Config) -> int:
    """The step of the float run, with a checkpoint, behind which training sees quantised numbers."""
    training = config.training
    if not 0 < config.share < 1:
        raise ConfigError(f"share is {config.share}; give a number between 0 and 1, such as 0.1")
    step = round((1 - config.share) * training.steps)
    if training.keep_every is None or step % training.keep_every:
        raise ConfigError(
            f"quantisation begins behind step {step}, of which the float run keeps no checkpoint; set "
            f"training.keep-every and training.checkpoint-every to divisors of {step}"
        )
    return step


def compare_formats(config: Config) -> Comparison:
    """Training for several formats, and converting the float runs in several ways; each with every seed."""
    base = replace(config, compare=False, seeds=())
    out, weights = config.out.parent, config.model.quantization.rules[0].weights

    def trained(**changes: Any) -> Config:
        return replace(base, model=base.model.replace(**changes))

    variants = {
        "float": float_run(base),
        "int4": base,
        "int4-fixed-steps": trained(quantization=quantization(weights)),
    }
    found = compare(variants, train, out=out, seeds=config.seeds, complete=started)
    console.print(found.table())
    code = code_identity(base, main)
    kept = [
        Measurements(out / f"conversions-seed{s}.json", scorecards(found, i), code) for i, s in enumerate(config.seeds)
    ]
    conversions = [convert_and_evaluate(base, out, s, k) for s, k in zip(config.seeds, kept, strict=True)]
    result = {"conversions": conversions, "cost_share": costs(conversions)}
    found.write(out / "comparison.json", **result)
    for measured in kept:
        measured.remove()
    console.print(json.dumps(finite_json(result["cost_share"])))
    return found


def convert_and_evaluate(config: Config, out: Path, seed: int, kept: Measurements) -> dict[str, float]:
    """Bits per byte of the float run's model after each conversion, and of the trained ones after theirs."""
    weights = config.model.quantization.rules[0].weights
    ways: dict[str, tuple[str, Quantization | None, Method]] = {
        "float": ("float", None, "rtn"),
        "int8": ("float", quantization(int8), "rtn"),
        "int8, int8 activations": ("float", quantization(int8, int8), "rtn"),
        "int8 cache": ("float", Quantization(cache=int8), "rtn"),
        "int4 cache": ("float", Quantization(cache=Integer(bits=4)), "rtn"),
        "int4": ("float", quantization(weights), "rtn"),
        "int4, gptq": ("float", quantization(weights), "gptq"),
        "int4, awq": ("float", quantization(weights), "awq"),
        **{f"trained {name}": (name, None, "rtn") for name in ("int4", "int4-fixed-steps")},
    }
    text = CorpusRows(config.corpus, config.training.length)
    evaluate, found = text.reporting(EVALUATED_ROWS).evaluator(), {}
    for name, (run, wanted, method) in ways.items():

        def measure(run: str = run, wanted: Quantization | None = wanted, method: Method = method) -> float:
            pieces = LayerwiseModel.read(out / f"{run}-seed{seed}")
            calibration = text.calibration(128) if method != "rtn" else None
            model = convert(pieces, wanted or pieces.config.quantization, method=method, calibration=calibration)[0]
            return evaluate(model)["bpb"]

        bpb = kept.cell(name, measure)
        found[name] = math.nan if bpb is None else bpb
    return found


def scorecards(found: Comparison, i: int) -> dict[str, Any]:
    """What conversions of the runs with the i-th seed depend on."""
    return {name: digest(asdict(cards[i])) for name, cards in found.cards.items()}


def costs(conversions: list[dict[str, float]]) -> dict[str, list[float]]:
    """Bits per byte above the float model's, as a share of it, for each seed."""
    return {name: [found[name] / found["float"] - 1 for found in conversions] for name in conversions[0]}


if __name__ == "__main__":
    run_recipe(main, configs)
