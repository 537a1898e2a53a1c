"""Mixture of experts against dense models: of equal active parameters, and of twice the FLOPs.

    python data/python.py --out corpora/python
    python recipes/moe.py cpu                                # one run
    python recipes/moe.py cpu --compare dense                # nine runs: three models, three seeds
    python recipes/moe.py cpu --compare longer               # three more: the dense model on twice the tokens
    python recipes/moe.py cpu --upcycle runs/small-dense     # starts as a copy of a dense run whose d_ff is d_expert
    python recipes/moe.py v5e-64 --corpus corpora/python     # on every worker of a TPU slice

A comparison leaves ``comparison-dense.json`` in the output folder, with the FLOPs at which the dense models reach the
bits per byte of the mixture. When interrupted it continues; several processes may share it by ``--seeds``.

Measured, cpu, three seeds, mean +- standard deviation of bits per byte (2 cores of an Intel Xeon, commit 0c9364672152):
1.832 +- 0.007 at 21 TFLOP; dense of equal active parameters 1.874 +- 0.025; dense of twice the FLOPs 1.857 +- 0.003.
Dense on twice the tokens, seed 0 alone: 1.641 at 42 TFLOP.
gpu, v5e-64: not measured; v5e-64 compiles for v5e:8x8 to 6.7 GB a chip (``efftrain aot``).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flax import nnx

import efftrain
from efftrain.config import finite_json
from efftrain.experiment.compare import Comparison, compare, equal_quality_flops
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.scorecard.scorecard import Scorecard, table
from efftrain.models.config import Dense, MlpConfig, ModelConfig, llama
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.moe import MoE
from efftrain.models.moe.upcycle import check_upcycling, upcycle
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.sharding import hosts
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.run.directory import check_model, load_model_config


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """A mixture of experts.

    Attributes:
      compare: train dense models beside it, each with every seed: of equal active parameters, and of twice the FLOPs:
        "dense" by width, on the same tokens, "longer" by twice the tokens.
      seeds: of a comparison.
      upcycle: the run of a dense model to start from; its d_ff is the d_expert of the mixture.
    """

    corpus: Path = Path("corpora/python")
    out: Path = Path("runs/moe")
    compare: Literal["nothing", "dense", "longer"] = "nothing"
    seeds: tuple[int, ...] = (0, 1, 2)
    upcycle: Path | None = None


def with_mlp(model: ModelConfig, mlp: MlpConfig) -> ModelConfig:
    """The same stack with this feed-forward part in every block."""
    return model.replace(pattern=tuple(replace(block, mlp=mlp) for block in model.pattern))


cpu = Config(
    model=with_mlp(
        llama(vocab_size=4096, d_model=128, n_layers=4, n_heads=2, d_ff=512, max_length=512, tied_embedding=True),
        MoE(n_experts=8, top_k=2, d_expert=256),
    ),
    training=Training(
        steps=1000,
        batch_size=8,
        length=256,
        optimizer=AdamW(peak_lr=1.5e-3),
        checkpoint_every=200,
    ),
)
gpu = replace(  # about 125M active parameters of 400M
    cpu,
    model=with_mlp(
        llama(
            vocab_size=4096,
            d_model=768,
            n_layers=16,
            n_heads=12,
            d_ff=2304,
            max_length=2048,
            tied_embedding=True,
            dtype="bfloat16",
        ),
        MoE(n_experts=8, top_k=2, d_expert=1152),
    ),
    training=replace(
        cpu.training,
        steps=5000,
        batch_size=64,
        length=2048,
        optimizer=AdamW(peak_lr=1.5e-3),
        eval_every=500,
        checkpoint_every=500,
    ),
)
v5e_64 = replace(  # 8 experts of the size of a 1B model's feed-forward part
    gpu,
    model=with_mlp(
        llama(
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
        MoE(n_experts=8, top_k=2, d_expert=5632, exchange_factor=1.5),
    ),
    training=replace(
        gpu.training,
        steps=20_000,
        batch_size=512,
        optimizer=AdamW(peak_lr=6e-4),
        mesh=MeshConfig(fsdp=-1, expert=8),
    ),
)
configs = {"cpu": cpu, "gpu": gpu, "v5e-64": v5e_64}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective]:
    """The model and what is minimised: what ``fit`` trains, and what ``efftrain aot`` compiles."""
    return lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss


def main(config: Config) -> Scorecard | Comparison:
    if config.compare != "nothing":
        return compare_with_dense(config)
    if config.upcycle is not None:
        check_upcycling(load_model_config(config.upcycle), config.model)
        hosts.connect()
        check_model(config.upcycle)

    def from_dense() -> Decoder:
        return upcycle(efftrain.load(config.upcycle), config.model, rngs=nnx.Rngs(config.training.seed))

    initial = from_dense if config.upcycle else None
    card = train_and_score(config, *program(config), initial=initial, source=config.upcycle)[1]
    console.print(table([card]))
    return card


def compare_with_dense(config: Config) -> Comparison:
    """Every model with every seed, on the same batches, and what the mixture saves."""
    alone = replace(config, compare="nothing", seeds=())
    dense = dense_runs(alone, longer=config.compare == "longer")
    found = compare({"moe": alone, **dense}, main, out=config.out, seeds=config.seeds)
    console.print(found.table())

    gain, spread = found.gap("moe", "dense")
    spent, bpb = found.mean("moe", "train_flops"), found.mean("moe", "bpb")
    points = [(found.mean(name, "train_flops"), found.mean(name, "bpb")) for name in dense]
    needed = equal_quality_flops(points, bpb)
    better_than_all = bpb < min(quality for _, quality in points)
    result = {
        "gain_bpb": gain,
        "gain_bpb_sd": spread,
        "flops_moe": spent,
        "flops_dense_at_equal_quality": needed,
        "flops_share_at_equal_quality": needed and spent / needed,
        "flops_share_is_below": spent / max(flops for flops, _ in points) if better_than_all else None,
    }
    found.write(config.out / f"comparison-{config.compare}.json", **result)
    console.print(json.dumps(finite_json(result)))
    return found


def dense_runs(config: Config, *, longer: bool) -> dict[str, Config]:
    """A dense model of the mixture's active parameters, and one that spends twice its FLOPs: on width, or on tokens."""
    mixture = next(block.mlp for block in config.model.pattern if isinstance(block.mlp, MoE))
    active = (mixture.top_k + mixture.n_shared) * mixture.d_expert

    def dense(d_ff: int) -> Config:
        return replace(config, model=with_mlp(config.model, Dense(d_ff=d_ff)))

    def flops(config: Config) -> float:
        return training_flops(abstract_decoder(config.model), config.training.length)

    equal = dense(active)
    if longer:
        twice = replace(config.training, steps=2 * config.training.steps)
        return {"dense": equal, "dense-longer": replace(equal, training=twice)}
    per_column = (flops(dense(2 * active)) - flops(equal)) / active
    columns = (2 * flops(config) - flops(equal)) / per_column
    return {"dense": equal, "dense-wide": dense(active + 8 * math.ceil(columns / 8))}


if __name__ == "__main__":
    run_recipe(main, configs)
