"""Every pair of techniques: three steps on 8 devices, a gradient for every leaf, a checkpoint that restores.

Pairs are tried four techniques at a time: a fifth of the programs, and more asked of each. A technique is one function
that changes the model or the training; a step that builds one adds it to ``TECHNIQUES``.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import efftrain
from efftrain.compress.distillation.distill import Distill, FromCache, FromTeacher, distilled
from efftrain.compress.distillation.features import HiddenStates
from efftrain.compress.distillation.on_policy import OnPolicy
from efftrain.compress.layerwise.calibration import CalibrationRows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.pruning.scores import Magnitude
from efftrain.compress.pruning.sparsify import Sparsity
from efftrain.compress.pruning.sparsity_schedules import OneShot
from efftrain.compress.quantization.convert import convert
from efftrain.compress.structured.cut import Shape, structured_prune
from efftrain.compress.structured.importance import importance
from efftrain.errors import ConfigError
from efftrain.models.config import BlockConfig, Dense, DepthConfig, Full, LayerDropout, ModelConfig, llama
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths, Recursion
from efftrain.models.moe import MoE
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.models.zeros import zeros_share
from efftrain.ops.number_formats import Integer
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.config import Training
from efftrain.train.loop import fit
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.objectives.objective import EarlyExitLoss, Objective, next_token_loss
from efftrain.train.objectives.teacher import Teacher, TeacherObjective, Together
from efftrain.train.optimizers import Muon
from efftrain.train.run.directory import Run
from efftrain.train.schedules import Ramp

ROWS, LENGTH, VOCAB = 16, 16, 64


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig
    training: Training
    exits: EarlyExitLoss | None = None
    sparsity: Sparsity | None = None
    structured: bool = False
    distill: Distill | None = None


BASE = Config(
    model=llama(vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, max_length=LENGTH),
    training=Training(steps=3, batch_size=ROWS, length=LENGTH, mesh=MeshConfig(fsdp=4, tensor=2)),
)


def change_model(**changes) -> Callable[[Config], Config]:
    return lambda config: dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def change_training(**changes) -> Callable[[Config], Config]:
    return lambda config: dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def local_and_global(config: Config) -> Config:
    """Every second layer sees a window, with normalised queries and keys."""
    block = config.model.pattern[0]
    local = dataclasses.replace(block.attention, window=4, qk_norm=True)
    pattern = (BlockConfig(attention=local, mlp=block.mlp), block)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=pattern, n_repeats=1))


def attention_sinks(config: Config) -> Config:
    """In every layer."""
    pattern = tuple(
        dataclasses.replace(block, attention=dataclasses.replace(block.attention, sinks=True))
        for block in config.model.pattern
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=pattern))


def mixture_of_experts(config: Config) -> Config:
    """In every layer, the experts spread over devices."""
    pattern = tuple(dataclasses.replace(block, mlp=MoE(n_experts=4, d_expert=16)) for block in config.model.pattern)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=pattern))
    return change_training(mesh=MeshConfig(fsdp=2, expert=2, tensor=2))(config)


def layer_skip(config: Config) -> Config:
    """Layers left out at random, and an early exit."""
    config = change_model(layer_dropout=LayerDropout(rate=0.2, ramp_steps=3))(config)
    return dataclasses.replace(config, exits=EarlyExitLoss(scale=0.5, stride=2))


def four_bits(config: Config) -> Config:
    """Matrices of blocks in 4 bits with learned steps, 8 bits for what they are multiplied with and for the cache."""
    rule = QuantizationRule(
        weights=Integer(bits=4, group=8), activations=Integer(bits=8), learned_step=True, layers="blocks/.*"
    )
    return change_model(quantization=Quantization(rules=(rule,), cache=Integer(bits=8)))(config)


def half_of_the_weights(config: Config) -> Config:
    """Pruned in the first step, and allowed to come back in none."""
    sparsity = Sparsity(schedule=OneShot(at=0.0), score=Magnitude(straight_through=True))
    return dataclasses.replace(config, sparsity=sparsity)


def cut_in_width(config: Config) -> Config:
    """Half of the hidden channels and of the units sliced out of another model, before the first step."""
    return dataclasses.replace(config, structured=True)


def taught(config: Config) -> Config:
    """By a wider model in bfloat16, with hidden states through projections, at a temperature that falls."""
    how = Distill(alpha=Ramp(start=0.7), temperature=Ramp(start=2.0, end=1.0), features=HiddenStates())
    return dataclasses.replace(config, distill=how)


def routed(depth: DepthConfig) -> Callable[[Config], Config]:
    """In the last block of the pattern, or behind it where that one is routed too."""

    def change(config: Config) -> Config:
        *before, last = config.model.pattern
        if last.depth == Full():
            return change_model(pattern=(*before, dataclasses.replace(last, depth=depth)))(config)
        return change_model(pattern=(*before, last, dataclasses.replace(last, depth=depth)), n_repeats=1)(config)

    return change


def tokens_over_devices(config: Config) -> Config:
    mesh = config.training.mesh
    return change_training(mesh=dataclasses.replace(mesh, fsdp=mesh.fsdp // 2, context=2))(config)


TECHNIQUES: dict[str, Callable[[Config], Config]] = {
    "bfloat16": change_model(dtype="bfloat16"),
    "scan and remat": change_model(scan=True, remat="full"),
    "local and global layers": local_and_global,
    "attention sinks": attention_sinks,
    "mixture of experts": mixture_of_experts,
    "layer dropout and early exits": layer_skip,
    "mixture of depths": routed(MixtureOfDepths(capacity=0.5)),
    "recursion": routed(Recursion(shares=(1.0, 0.5))),
    "quantisation": four_bits,
    "sparsity": half_of_the_weights,
    "structured pruning": cut_in_width,
    "distillation": taught,
    "muon": change_training(optimizer=Muon(peak_lr=1e-2)),
    "tokens split over devices": tokens_over_devices,
    "averaged, in micro-batches": change_training(ema_decay=0.5, n_microbatches=2),
}

# What structured pruning does not cut, and says so.
NOT_CUT = {"mixture of depths", "recursion", "quantisation"}
REFUSED = [{"structured pruning", name} for name in NOT_CUT]


def together(names: list[str], apart: list[set[str]], size: int = 4) -> list[tuple[str, ...]]:
    """Few sets of names in which every two are together, except those that must be apart."""
    left = {pair for pair in itertools.combinations(names, 2) if set(pair) not in apart}
    found = []
    allowed = [t for t in itertools.combinations(names, size) if not any(pair <= set(t) for pair in apart)]
    while left:
        best = max(allowed, key=lambda t: len(left & set(itertools.combinations(t, 2))))
        found.append(best)
        left -= set(itertools.combinations(best, 2))
    return found


def made_smaller(config: ModelConfig) -> Decoder:
    """Of a new model, by what it does on the rows."""
    rows = Rows().batch
    pieces = LayerwiseModel.of(Decoder(config, rngs=nnx.Rngs(1)))
    dense = any(isinstance(block.mlp, Dense) for block in config.pattern)
    shape = dataclasses.replace(Shape.of(config), d_model=8, ffn=0.5 if dense else 1.0)
    found = importance(pieces, CalibrationRows(rows["tokens"], rows["segments"], rows["positions"]))
    return structured_prune(pieces, shape, found)[0]


def program(config: Config) -> tuple[Callable[[nnx.Rngs], Decoder], Objective | TeacherObjective]:
    def build(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config.model, rngs=rngs)

    plain = config.exits or next_token_loss
    if config.distill is None:
        return build, plain
    wide = dataclasses.replace(BASE.model, d_model=32)
    teacher = Teacher.of(Decoder(wide, rngs=nnx.Rngs(3)), dtype="bfloat16")
    build, objective = distilled(build, config.model, config.distill, teacher)
    return build, Together(first=objective, second=plain) if config.exits else objective


class Rows:
    """The same packed rows in every step."""

    def __init__(self):
        tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1), dtype=np.int32)
        positions = np.arange(LENGTH, dtype=np.int32)
        self.batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": np.broadcast_to(1 + (positions >= 6), (ROWS, LENGTH)).astype(np.int32),
            "positions": np.broadcast_to(np.where(positions >= 6, positions - 6, positions), (ROWS, LENGTH)),
            "mask": np.ones((ROWS, LENGTH), bool),
        }

    def __next__(self) -> dict[str, np.ndarray]:
        return self.batch

    def get_state(self) -> None:
        return None

    def set_state(self, state: None) -> None:
        pass


def first_moments(run: Path) -> dict[str, np.ndarray]:
    """The optimizer's mean gradient of every parameter of a run, by the parameter's name: zero if it had none."""
    arrays = ocp.PyTreeCheckpointer().restore(run / "checkpoints" / "3" / "state")
    names = [name.removeprefix("params/") for name in arrays if name.startswith("params/")]
    moments = {name: [key for key in arrays if key.endswith(f"/mu/{name}")] for name in names}
    assert all(len(keys) == 1 for keys in moments.values()), moments
    return {name: np.asarray(arrays[keys[0]]) for name, keys in moments.items()}


def test_every_pair_is_tried():
    tried = {pair for names in together(list(TECHNIQUES), REFUSED) for pair in itertools.combinations(names, 2)}
    assert all(pair in tried or set(pair) in REFUSED for pair in itertools.combinations(TECHNIQUES, 2))


@pytest.mark.parametrize("name", sorted(NOT_CUT))
def test_what_cannot_be_cut_is_refused(name: str):
    with pytest.raises(ConfigError, match=r"prun|cut"):
        made_smaller(TECHNIQUES[name](BASE).model)


@pytest.mark.parametrize("names", together(list(TECHNIQUES), REFUSED), ids=" + ".join)
def test_techniques_work_together(names: tuple[str, ...], tmp_path: Path):
    config = BASE
    for name in names:
        config = TECHNIQUES[name](config)
    initial = None
    if config.structured:
        smaller = made_smaller(config.model)
        initial, config = lambda: smaller, dataclasses.replace(config, model=smaller.config)
    build, objective = program(config)
    fitted = fit(
        build,
        objective,
        Rows(),
        config.training,
        Run(tmp_path, config),
        initial=initial,
        wrap=config.sparsity and config.sparsity.around(config.training),
    )

    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]

    for name, moment in first_moments(tmp_path).items():
        assert np.isfinite(moment).all(), name
        assert np.abs(moment).max() > 0, name
    assert all(row["skipped"] == 0 for row in read_metrics(tmp_path))  # those of training were finite too

    restored = nnx.state(efftrain.load(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(fitted.model), restored)

    if config.sparsity is not None:
        assert zeros_share(fitted.model) == 0.5
    if config.model.quantization != Quantization():  # what was trained is what is stored
        trained = efftrain.load(tmp_path)
        stored = convert(LayerwiseModel.read(tmp_path), config.model.quantization)[0]
        tokens = Rows().batch["tokens"]
        if config.model.dtype == "float32":
            np.testing.assert_array_equal(stored(tokens), trained(tokens))
        else:
            np.testing.assert_allclose(stored(tokens), trained(tokens), atol=0.1)


class Kept(Rows):
    """With what a cache keeps of a teacher."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(1)
        probs = rng.dirichlet(np.ones(5), (ROWS, LENGTH)).astype(np.float32)[..., :4]
        self.batch |= {"teacher_ids": rng.integers(0, VOCAB, (ROWS, LENGTH, 4), dtype=np.int32), "teacher_probs": probs}


def from_cache() -> FromCache:
    return FromCache(how=Distill(alpha=Ramp(start=0.8)), tail=True)


def answering() -> FromTeacher:
    teacher = Teacher.of(Decoder(dataclasses.replace(BASE.model, d_model=32), rngs=nnx.Rngs(3)))
    return FromTeacher(how=Distill(beta=0.5, on_policy=OnPolicy(fraction=0.999, n_new=6, prompt=4)), teacher=teacher)


@pytest.mark.parametrize(
    ("objective", "mesh"),
    [(from_cache, MeshConfig(fsdp=2, tensor=2, context=2)), (answering, MeshConfig(fsdp=4, tensor=2))],
    ids=["cached", "on policy"],
)
def test_a_mesh_changes_nothing_of_what_is_learned(
    objective: Callable[[], TeacherObjective], mesh: MeshConfig, tmp_path: Path
):
    """Rows and tokens over devices: the losses of one device."""
    losses = []
    for n, shape in ((1, MeshConfig(fsdp=1)), (8, mesh)):
        config = change_training(mesh=shape)(BASE)
        fit(
            lambda rngs: Decoder(BASE.model, rngs=rngs),
            objective(),
            Kept(),
            config.training,
            Run(tmp_path / str(n), config),
            devices=jax.devices()[:n],
        )
        losses.append([row["loss/teacher"] for row in read_metrics(tmp_path / str(n))])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][-1] != losses[0][0]
