"""Every recipe compiled for TPU slices that are not here, at reduced width; the real configurations under `slow`."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import nnx

from efftrain.errors import ConfigError
from efftrain.measure.compiled.aot import CompiledStep, Target, compile_target, read_target
from efftrain.measure.cost.flops import FORWARD_AND_BACKWARD, training_flops
from efftrain.measure.cost.mesh_estimate import axis_traffic
from efftrain.models.config import Dense, ModelConfig
from efftrain.models.depth.routed_depth import Recursion
from efftrain.recipe import import_script
from efftrain.sharding.mesh import MeshConfig
from efftrain.sharding.topologies import find_topology
from efftrain.train.objectives.teacher import teacher_of

pytestmark = pytest.mark.tpu_aot

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if "def program(" in path.read_text())
# libtpu 0.0.52 raises an internal error when it prints these programs: counted by formulas, with a warning.
NO_TEXT = {("moe", "v5p:2x2x1"), ("moe", "v6e:2x2")}
KEPT = ROOT / "tests" / "bench" / "results" / "aot.json"


@pytest.fixture(scope="module", autouse=True)
def _no_cache():
    """A program for another machine does not come back from the cache with its text."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def narrow(model: ModelConfig) -> ModelConfig:
    """The same stack with two repeats and small layers, wide enough for a kernel and a tile."""
    pattern = tuple(
        replace(
            block,
            attention=replace(block.attention, n_heads=4, n_kv_heads=2, d_head=64),
            mlp=replace(block.mlp, **({"d_ff": 512} if isinstance(block.mlp, Dense) else {"d_expert": 256})),
            depth=replace(block.depth, n_layers=1) if isinstance(block.depth, Recursion) else block.depth,
        )
        for block in model.pattern
    )
    n_repeats = min(model.n_repeats, 2)
    return model.replace(pattern=pattern, d_model=256, n_repeats=n_repeats, vocab_size=512, max_length=256)


def reduced(recipe: Path, name: str | None = None, **mesh) -> Target:
    """A configuration of a recipe, the last and largest by default, at reduced width, 8 rows of 256 tokens."""
    script = import_script(recipe)
    config = list(script.configs.values())[-1] if name is None else script.configs[name]
    training = replace(config.training, batch_size=8, length=256, n_microbatches=1, mesh=MeshConfig(**mesh))
    models = {name: narrow(value) for name, value in vars(config).items() if isinstance(value, ModelConfig)}
    build, objective, *wrap = script.program(replace(config, **models, training=training))
    return Target(recipe.stem, build, objective, training, *wrap)


def check(report: CompiledStep, target: Target) -> None:
    model = nnx.eval_shape(lambda: target.build(nnx.Rngs(0)))
    state = report.memory.parameters + report.memory.optimizer + report.memory.other_state + report.memory.batch
    assert report.memory.fits
    assert report.memory.total >= state + report.memory.temporaries
    tokens = target.training.batch_size * target.training.length / report.devices
    flops, teacher = training_flops(model, target.training.length), teacher_of(target.objective)
    if teacher is not None:
        flops += training_flops(teacher.abstract_model(), target.training.length) / FORWARD_AND_BACKWARD
        assert report.memory.teacher > 0
    assert report.model_flops == pytest.approx(flops * tokens)
    unprintable = (target.name, report.topology) in NO_TEXT
    assert report.counted_from == ("formulas" if unprintable else "program")
    assert unprintable == any("text of the program is not available" in warning for warning in report.warnings)
    assert 0.9 < report.flops / report.model_flops < 2
    assert report.times.step_s > 0
    assert {axis for row in report.collectives for axis in row.axes} <= {a for a, n in report.mesh.items() if n > 1}


@pytest.mark.parametrize("slice_", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_compiles_for_small_slices(recipe, slice_):
    target = reduced(recipe, fsdp=-1)
    report = compile_target(target, find_topology(slice_))
    check(report, target)
    assert report.mesh["fsdp"] == 4
    assert (report.counted_from == "formulas") != any(row.axes == ("fsdp",) for row in report.collectives)


def test_tensor_parallelism_compiles_and_talks_along_its_axis():
    target = reduced(ROOT / "recipes" / "dense.py", fsdp=2, tensor=2)
    report = compile_target(target, find_topology("v5e:2x2"))
    check(report, target)
    assert ("tensor",) in {row.axes for row in report.collectives}


@pytest.mark.parametrize("name", ["layerskip", "mixture-of-depths", "recursion"])
def test_adaptive_depth_compiles_on_two_axes(name):
    target = reduced(ROOT / "recipes" / "adaptive_depth.py", f"{name}-v5e-64", fsdp=2, tensor=2)
    report = compile_target(target, find_topology("v5e:2x2"))
    check(report, target)
    assert {("fsdp",), ("tensor",)} <= {row.axes for row in report.collectives}


def test_expert_parallelism_sends_rows_by_all_to_all():
    target = reduced(ROOT / "recipes" / "moe.py", fsdp=2, expert=2)
    report = compile_target(target, find_topology("v5e:2x2"))
    check(report, target)
    rows = [row for row in report.collectives if row.kind == "all-to-all"]
    assert {row.axes for row in rows} == {("expert",)}
    # There and back, forward and backward, and once more forward by remat, in 2 layers: of a device's 2 x 512
    # assignments 1.5 x as many rows of 256 bfloat16, half of which stay.
    assert sum(row.sent for row in rows) == pytest.approx(2 * 6 * 1.5 * 2 * 512 * 256 * 2 / 2, rel=0.01)
    formula = axis_traffic(nnx.eval_shape(lambda: target.build(nnx.Rngs(0))), target.training, report.mesh)
    assert sum(row.sent for row in rows) == pytest.approx(formula["expert",], rel=0.01)


@pytest.mark.parametrize(
    ("name", "n_devices", "chip"),
    [
        ("v4:2x2x4", 16, "v4"),  # in megacore mode: one device a chip
        ("v5e:1x1", 1, "v5e"),
        ("v5e:2x4", 8, "v5e"),
        ("v5litepod:16x16", 256, "v5e"),
        ("v5p:2x2x2", 8, "v5p"),
        ("v6e:4x8", 32, "v6e"),
    ],
)
def test_slices_have_the_chips_that_their_names_say(name, n_devices, chip):
    found = find_topology(name)
    assert (len(found.devices), found.chip.name) == (n_devices, chip)


def test_a_shape_that_does_not_exist_is_one_sentence():
    with pytest.raises(ConfigError, match="--topology v5e:3x3 is not available"):
        find_topology("v5e:3x3")


@pytest.mark.slow
@pytest.mark.parametrize("slice_", ["v5e:8x8", "v5e:16x16"])
def test_the_real_configuration_fits_and_computes_what_was_kept(slice_):
    topology = find_topology(slice_)
    kept = json.loads(KEPT.read_text())
    (before,) = [report for report in kept["reports"] if report["topology"] == slice_]
    target = read_target(ROOT / "recipes" / "dense.py", "v5e-64")
    rows = kept["rows_per_chip"] * len(topology.devices)
    target = replace(target, training=replace(target.training, batch_size=rows))
    report = compile_target(target, topology)
    check(report, target)
    assert report.flops == pytest.approx(before["flops"], rel=0.02)
    assert report.memory.total <= 1.1 * before["memory"]["total"]
