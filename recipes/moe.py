"""Mixture of experts against dense models: of equal active parameters, and of twice the FLOPs.

    python data/python.py --out corpora/python
    python recipes/moe.py cpu                                # one run
    python recipes/moe.py cpu --compare dense                # nine runs: three models, three seeds
    python recipes/moe.py cpu --compare longer               # three more: the dense model on twice the tokens
    python recipes/moe.py cpu --upcycle runs/small-dense     # starts from a dense run: each expert is a copy of its mlp
    python recipes/moe.py v5e-64 --corpus corpora/python     # on every worker of a TPU slice

A comparison writes ``comparison-dense.json`` into the output folder, with the FLOPs at which the dense models reach the
bits per byte of the mixture. If it is interrupted, the same command continues it; several processes may share it by
``--seeds``.

Measured: recipes/moe.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from flax import nnx

from efftrain.experiment import presets
from efftrain.experiment.compare import Comparison, compare, equal_quality_flops
from efftrain.experiment.conversion import conversion
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.scorecard.scorecard import Scorecard, table
from efftrain.models.config import Dense, ModelConfig, llama
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.moe import MoE
from efftrain.models.moe.upcycle import check_upcycling, upcycle
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.optimizers import AdamW


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """A mixture of experts.

    Attributes:
      compare: also train dense models, each with every seed: one with as many active parameters, and one with twice the
        FLOPs. "dense": the latter is wider. "longer": it reads twice the tokens.
      seeds: seeds of a comparison.
      upcycle: run of a dense model to start from. The model is that of the run, with experts of its ``d_ff``.
    """

    corpus: Path = Path("corpora/python")
    out: Path = Path("runs/moe")
    compare: Literal["nothing", "dense", "longer"] = "nothing"
    seeds: tuple[int, ...] = (0, 1, 2)
    upcycle: Path | None = None
    start_flags: ClassVar[tuple[str, ...]] = ("upcycle", *Experiment.start_flags)

    def of_model(self, model: ModelConfig) -> "Config":
        """The model of a run, with a mixture in place of each dense feed-forward part."""
        mixture = next(block.mlp for block in self.model.pattern if isinstance(block.mlp, MoE))
        pattern = tuple(
            replace(block, mlp=replace(mixture, d_expert=block.mlp.d_ff)) if isinstance(block.mlp, Dense) else block
            for block in model.pattern
        )
        return super().of_model(model.replace(pattern=pattern))


small = llama(vocab_size=4096, d_model=128, n_layers=4, n_heads=2, d_ff=512, max_length=512, tied_embedding=True)
cpu = Config(
    model=small.with_blocks(mlp=MoE(n_experts=8, top_k=2, d_expert=256)),
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
    model=presets.llama_125m.with_blocks(mlp=MoE(n_experts=8, top_k=2, d_expert=1152)),
    training=presets.gpu_training,
)
v5e_64 = replace(  # 8 experts, each as large as the feed-forward part of a 1B model
    cpu,
    model=presets.llama_1b.with_blocks(mlp=MoE(n_experts=8, top_k=2, d_expert=5632, exchange_factor=1.5)),
    training=replace(presets.v5e_64_training, mesh=MeshConfig(fsdp=-1, expert=8)),
)
configs = {"cpu": cpu, "gpu": gpu, "v5e-64": v5e_64}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective]:
    """The model and what is minimised: what ``fit`` trains, and what ``efftrain aot`` compiles."""
    return lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss


def main(config: Config) -> Scorecard | Comparison:
    if config.compare != "nothing":
        return compare_with_dense(config)
    initial = conversion(config, config.upcycle, check_upcycling, upcycle)
    card = train_and_score(config, *program(config), initial=initial, source=config.upcycle)[1]
    console.print(table([card]))
    return card


def compare_with_dense(config: Config) -> Comparison:
    """Trains every model with every seed, on the same batches, and computes what the mixture saves."""
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
    return found


def dense_runs(config: Config, *, longer: bool) -> dict[str, Config]:
    """A dense model with as many active parameters, and one that spends twice the FLOPs: on width, or on tokens."""
    mixture = next(block.mlp for block in config.model.pattern if isinstance(block.mlp, MoE))
    active = (mixture.top_k + mixture.n_shared) * mixture.d_expert

    def dense(d_ff: int) -> Config:
        return replace(config, model=config.model.with_blocks(mlp=Dense(d_ff=d_ff)))

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
