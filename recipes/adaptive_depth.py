"""Adaptive depth: models in which easy tokens take fewer layers, against a plain model of the same training compute.

    python data/python.py --out corpora/python
    python recipes/adaptive_depth.py layerskip                         # one run
    python recipes/adaptive_depth.py layerskip --compare plain         # nine: with, without, switched off; three seeds
    python recipes/adaptive_depth.py mixture-of-depths --compare plain # three more; the plain runs are shared
    python recipes/adaptive_depth.py recursion --compare plain
    python recipes/adaptive_depth.py mixture-of-depths --convert RUN   # from a plain run that is trained
    python recipes/adaptive_depth.py layerskip-v5e-64 --corpus corpora/python   # on every worker of a TPU slice

layerskip: late in training some layers are left out at random, and early ones learn to do without the others, so that
decoding can draft with them and check with all (``efftrain calibrate-depth RUN``). mixture-of-depths: a quarter of the
tokens pass every second block. recursion: half the layers; the tokens pass the inner ones up to three times.

A comparison writes ``comparison-NAME.json`` into the output folder; the same command continues an interrupted one.

Measured: recipes/adaptive-depth.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from flax import nnx

from efftrain.errors import ConfigError
from efftrain.experiment import presets
from efftrain.experiment.compare import Comparison, compare
from efftrain.experiment.conversion import conversion
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.cost.flops import prefill_flops, training_flops
from efftrain.measure.cost.objective_flops import objective_flops
from efftrain.measure.scorecard.scorecard import Scorecard, table
from efftrain.models.config import Dense, Full, LayerDropout, ModelConfig, llama
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.depth.convert import check_mixture_of_depths, every_second, looped, with_mixture_of_depths
from efftrain.models.depth.routed_depth import MixtureOfDepths
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.train.config import Training
from efftrain.train.objectives.objective import EarlyExitLoss, Objective, next_token_loss
from efftrain.train.optimizers import AdamW


@dataclass(frozen=True, kw_only=True)
class Config(Experiment):
    """A model of adaptive depth.

    Attributes:
      name: name of the variant in a comparison.
      exits: the loss of early exits. None: only the loss of the last layer.
      convert: run of a plain model to start from. The model is that of the run, with a router for every second layer.
      compare: also train plain models, in which every token passes every layer, as deep and with the same training
        FLOPs. With exits, also the same run without them, see ``switched_off``.
      seeds: seeds of a comparison.
    """

    name: str = "plain"
    exits: EarlyExitLoss | None = None
    convert: Path | None = None
    corpus: Path = Path("corpora/python")
    out: Path = Path("runs/adaptive-depth")
    compare: Literal["nothing", "plain"] = "nothing"
    seeds: tuple[int, ...] = (0, 1, 2)
    start_flags: ClassVar[tuple[str, ...]] = ("convert", *Experiment.start_flags)

    def of_model(self, model: ModelConfig) -> "Config":
        """The model of a run, with the depth policy of this configuration unless it has one."""
        depth = next((block.depth for block in self.model.pattern if block.depth != Full()), Full())
        if isinstance(depth, MixtureOfDepths) and all(block.depth == Full() for block in model.pattern):
            model = every_second(model, depth)
        return super().of_model(model)


def variants(plain: Config, *, layerskip: int, mixture_of_depths: int, recursion: int) -> dict[str, Config]:
    """Each technique on a model, with as many steps as give about the training FLOPs of the plain one."""

    def variant(name: str, steps: int, model: ModelConfig, exits: EarlyExitLoss | None = None) -> Config:
        return replace(plain, name=name, model=model, exits=exits, training=replace(plain.training, steps=steps))

    decay = 4 * layerskip // 5  # where the learning rate's decay begins: before it, both cost the last layer more
    dropout = LayerDropout(rate=0.12, after=decay)
    exits = EarlyExitLoss(scale=0.3, weighting="equal", stride=4, after=decay)
    rounds = (1.0, 2 / 3, 1 / 3)
    inner = (plain.model.n_layers - 2) // len(rounds)
    return {
        "layerskip": variant("layerskip", layerskip, plain.model.replace(layer_dropout=dropout), exits),
        "mixture-of-depths": variant(
            "mixture-of-depths", mixture_of_depths, every_second(plain.model, MixtureOfDepths(capacity=0.25))
        ),
        "recursion": variant("recursion", recursion, looped(plain.model, inner, rounds)),
        "plain": plain,
    }


def flops_per_token(config: Config) -> float:
    """FLOPs per training token, with the heads of the exits."""
    training, objective = config.training, program(config)[1]
    flops = training_flops(abstract_decoder(config.model), training.length, steps=training.steps)
    return flops + objective_flops(objective, config.model, training)


cpu = Config(
    model=llama(vocab_size=4096, d_model=128, n_layers=8, n_heads=2, d_ff=512, max_length=512, tied_embedding=True),
    training=Training(
        steps=500,
        batch_size=8,
        length=256,
        optimizer=AdamW(peak_lr=1.5e-3),
        checkpoint_every=200,
    ),
)
deep_125m = presets.llama_125m.with_blocks(mlp=Dense(d_ff=2048)).replace(n_repeats=20)
gpu = replace(cpu, model=deep_125m, training=presets.gpu_training)
v5e_64 = replace(cpu, model=presets.llama_1b, training=presets.v5e_64_training)
sizes = {
    "": variants(cpu, layerskip=500, mixture_of_depths=724, recursion=635),
    "-gpu": variants(gpu, layerskip=5049, mixture_of_depths=8021, recursion=7321),
    "-v5e-64": variants(v5e_64, layerskip=20_206, mixture_of_depths=31_716, recursion=28_847),
}
configs = {f"{name}{size}": config for size, named in sizes.items() for name, config in named.items()}


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective]:
    """The model and what is minimised: what ``fit`` trains, and what ``efftrain aot`` compiles."""
    return lambda rngs: Decoder(config.model, rngs=rngs), config.exits or next_token_loss


def main(config: Config) -> Scorecard | Comparison:
    if config.compare != "nothing":
        return compare_with_plain(config)
    check_begins(config)
    start = conversion(config, config.convert, check_mixture_of_depths, with_mixture_of_depths)
    card = train_and_score(config, *program(config), initial=start, source=config.convert)[1]
    console.print(table([card]))
    return card


def check_begins(config: Config) -> None:
    """Raises ConfigError if a shortened run would end before exits and layer dropout begin."""
    late = {"exits.after": config.exits.after if config.exits else 0}
    late["model.layer_dropout.after"] = config.model.layer_dropout.after
    for name, after in late.items():
        if after >= config.training.steps and not config.name.endswith("-off"):
            raise ConfigError(f"{name} is {after} and the run has {config.training.steps} steps; give fewer, such as 0")


def compare_with_plain(config: Config) -> Comparison:
    """Trains the models with every seed, on the same data."""
    alone = replace(config, compare="nothing", seeds=())
    plain = plain_of(alone)
    models = {"plain": plain, config.name: alone}
    if config.exits is not None:
        models |= {f"{config.name}-off": switched_off(alone)}
    found = compare(models, main, out=config.out, seeds=config.seeds)
    console.print(found.table())
    gain, spread = found.gap(config.name, "plain")
    reading = [prefill_flops(abstract_decoder(c.model), config.training.length) for c in (alone, plain)]
    result = {
        "gain_bpb": gain,
        "gain_bpb_sd": spread,
        "gain_share": gain / found.mean("plain", "bpb"),
        **(loss_of_the_last_layer(found, config.name) if config.exits else {}),
        "train_flops_share": found.mean(config.name, "train_flops") / found.mean("plain", "train_flops"),
        "forward_flops_share": reading[0] / reading[1],
    }
    found.write(config.out / f"comparison-{config.name}.json", **result)
    return found


def switched_off(config: Config) -> Config:
    """The same run, to the bit, up to the step where layer dropout and exits begin; it continues without them.

    Two plain runs of one seed that differ in a rounding end as far apart as two seeds. Only this run shows the cost.
    """
    never = config.training.steps
    model = config.model.replace(layer_dropout=replace(config.model.layer_dropout, after=never))
    return replace(config, name=f"{config.name}-off", model=model, exits=replace(config.exits, after=never))


def loss_of_the_last_layer(found: Comparison, name: str) -> dict[str, float]:
    """What dropout and exits cost the last layer in bits per byte: mean, standard deviation, share."""
    mean, spread = found.gap(f"{name}-off", name)
    return {"cost_bpb": mean, "cost_bpb_sd": spread, "cost_share": mean / found.mean(f"{name}-off", "bpb")}


def plain_of(config: Config) -> Config:
    """A plain model with one block for each pass, which all tokens pass, for as many training FLOPs."""
    block = replace(config.model.pattern[0], depth=Full())
    n_layers = sum(len(block.depth.passes()) for block in config.model.layers)
    model = config.model.replace(pattern=(block,), n_repeats=n_layers, layer_dropout=LayerDropout())
    plain = replace(config, name="plain", model=model, exits=None)
    steps = round(config.training.steps * flops_per_token(config) / flops_per_token(plain))
    return replace(plain, training=replace(config.training, steps=steps))


if __name__ == "__main__":
    run_recipe(main, configs)
