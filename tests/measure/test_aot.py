"""Reports about a compiled train step, against formulas and against shards counted by hand; on fake CPU devices."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from efftrain.cli.main import main
from efftrain.errors import ConfigError
from efftrain.measure.compiled import aot
from efftrain.measure.compiled.aot_traffic import Traffic
from efftrain.measure.compiled.aot_warnings import loop_warnings, parameter_warnings
from efftrain.measure.cost.flops import training_flops, training_hardware_flops
from efftrain.measure.cost.mesh_estimate import axis_traffic
from efftrain.measure.cost.parameters import count_parameters
from efftrain.measure.mesh_advisor import mesh_shapes, search
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.sharding.chips import CHIPS
from efftrain.sharding.layout import Placed
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.topologies import find_topology
from efftrain.train.config import Training
from efftrain.train.objectives.objective import next_token_loss

ROOT = Path(__file__).parents[2]
MODEL = llama(
    vocab_size=128, d_model=64, n_layers=3, n_heads=8, n_kv_heads=4, d_ff=96, max_length=64, scan=True, remat="full"
)
TRAINING = Training(steps=10, batch_size=16, length=64)


def target(model=MODEL, training=TRAINING, **mesh) -> aot.Target:
    return aot.Target(
        name="test",
        build=lambda rngs: Decoder(model, rngs=rngs),
        objective=next_token_loss,
        training=replace(training, mesh=MeshConfig(**mesh)),
    )


@pytest.fixture(scope="module")
def report():
    return aot.compile_target(target(fsdp=4, replica=2), find_topology("cpu:8"))


def test_memory_is_the_sum_of_the_shards(report):
    """fsdp 4 quarters every matrix; AdamW keeps two moments of each parameter and a count; norms stay whole."""
    norms = (2 * MODEL.n_layers + 1) * MODEL.d_model
    matrices = count_parameters(abstract_decoder(MODEL)).total - norms
    parameters = 4 * (matrices // 4 + norms)
    assert report.memory.parameters == parameters
    assert 2 * parameters <= report.memory.optimizer <= 2 * parameters + 64
    assert report.memory.batch == 16 * 64 // 8 * (4 * 4 + 1)
    whole = report.memory
    held = whole.parameters + whole.optimizer + whole.other_state + whole.batch
    assert whole.total >= held + whole.temporaries
    assert whole.total - held - whole.temporaries < 4096 + 0.01 * held
    assert whole.fits is None


@pytest.mark.parametrize(
    ("scan", "mesh"),
    [(True, {"fsdp": 1}), (True, {"fsdp": 4, "replica": 2}), (False, {"fsdp": 2, "tensor": 4})],
)
def test_the_program_computes_the_flops_of_the_formulas_on_any_mesh(scan, mesh):
    model = MODEL.replace(scan=scan, remat="none")
    n = math.prod(mesh.values())
    found = aot.compile_target(target(model, **mesh), find_topology(f"cpu:{n}"))
    tokens = TRAINING.batch_size * TRAINING.length / n
    assert found.flops == pytest.approx(training_hardware_flops(abstract_decoder(model), 64) * tokens, rel=1e-6)
    assert found.model_flops == pytest.approx(training_flops(abstract_decoder(model), 64) * tokens)
    assert found.counted_from == "program"


def test_remat_counts_the_blocks_once_more_but_for_their_last_product(report):
    model, tokens = abstract_decoder(MODEL), 16 * 64 / 8
    last = 2 * MODEL.n_layers * MODEL.d_model * 96
    assert report.flops == pytest.approx((training_hardware_flops(model, 64) - last) * tokens, rel=1e-6)


def test_micro_batches_change_how_often_and_not_how_much(report):
    parts = aot.compile_target(
        target(training=replace(TRAINING, n_microbatches=2), fsdp=4, replica=2), find_topology("cpu:8")
    )
    assert parts.flops == pytest.approx(report.flops, rel=1e-6)
    assert parts.memory.parameters == report.memory.parameters
    assert parts.memory.temporaries < report.memory.temporaries


def test_collectives_name_the_axes_that_they_run_along(report):
    """Every layer is gathered over fsdp in both passes; the gradients are summed over both axes, never over tensor."""
    axes = {row.axes for row in report.collectives}
    assert ("fsdp",) in axes
    assert not any("tensor" in a or "context" in a for a in axes)
    gathered = sum(row.sent for row in report.collectives if row.kind == "all-gather" and "fsdp" in row.axes)
    layers = 4 * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert gathered >= 2 * layers * 3 / 4
    alone = aot.compile_target(target(fsdp=1), find_topology("cpu:1"))
    assert alone.collectives == []


def test_a_text_that_cannot_be_had_leaves_formulas_and_a_warning(monkeypatch):
    def no_text(self):
        raise RuntimeError("INTERNAL: async-update arity")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", no_text)
    found = aot.compile_target(target(fsdp=2), find_topology("cpu:2"))
    assert found.counted_from == "formulas"
    assert found.flops == pytest.approx(training_hardware_flops(abstract_decoder(MODEL), 64) * 16 * 64 / 2)
    assert any("async-update arity" in warning for warning in found.warnings)


def placed(shape: tuple[int, ...], spec: PartitionSpec) -> Placed:
    size = 4 * math.prod(shape)
    split = 8 if any(spec) else 1
    return Placed(
        path="p",
        shape=shape,
        dtype=jnp.dtype("float32"),
        axes=(None,) * len(shape),
        spec=spec,
        bytes_total=size,
        bytes_per_device=size // split,
    )


def test_large_replicated_parameters_and_padded_shards_are_warned_of():
    mesh = make_mesh(MeshConfig(fsdp=8))
    big, small = placed((512, 512), PartitionSpec("fsdp")), placed((512,), PartitionSpec())
    assert parameter_warnings([big, small], mesh, tiled=True) == []
    (found,) = parameter_warnings([big, placed((256, 256), PartitionSpec())], mesh, tiled=True)
    assert "replicated on every device (0.3 MB)" in found
    transposed = placed((512, 256), PartitionSpec(None, "fsdp"))  # a shard of 512 x 32 lies in memory as 32 x 512
    assert parameter_warnings([transposed], mesh, tiled=True) == []
    narrow = placed((4, 96, 800), PartitionSpec(None, "fsdp"))
    (found,) = parameter_warnings([narrow], mesh, tiled=True)
    assert "shard of 4 x 12 x 800 is padded" in found
    assert "1.49 times" in found  # 16 x 896; the other order, 800 x 128, would be worse
    assert parameter_warnings([narrow], mesh, tiled=False) == []


def test_an_activation_gathered_in_a_loop_is_warned_of_and_a_layer_is_not(report):
    assert not any("gathered" in warning for warning in report.warnings)
    params = nnx.split(abstract_decoder(MODEL), nnx.Param, ...)[1]
    layer = Traffic(
        kind="all-gather", axes=("fsdp",), count=3, sent=1.0, largest=4 * 64 * 128, in_loop=True, source="x"
    )
    text = type("Text", (), {"unknown_loops": []})()
    assert loop_warnings(text, [layer, replace(layer, largest=1e9, in_loop=False)], params) == []
    (found,) = loop_warnings(text, [replace(layer, largest=1e9)], params)
    assert "an activation is gathered" in found


def test_gradients_that_are_summed_whole_where_a_shard_would_do_are_warned_of():
    params = nnx.split(abstract_decoder(MODEL), nnx.Param, ...)[1]
    whole = Traffic(kind="all-reduce", axes=("fsdp",), count=3, sent=8.0, largest=4.0, in_loop=True, source="backward")
    text = type("Text", (), {"unknown_loops": []})()
    (found,) = loop_warnings(text, [whole, replace(whole, kind="all-gather", sent=2.0)], params)
    assert "80 % of the bytes" in found
    assert loop_warnings(text, [replace(whole, axes=("replica",))], params) == []


def test_mesh_shapes_are_all_ways_to_write_the_number_of_devices():
    shapes = mesh_shapes(8)
    assert len(set(shapes)) == len(shapes) == 20  # 2 ** 3 over four axes: C(6, 3)
    assert all(math.prod((s.replica, s.fsdp, s.expert, s.tensor, s.context)) == 8 for s in shapes)


def test_traffic_of_the_axes_by_hand():
    model = abstract_decoder(MODEL)
    count = count_parameters(model).total
    sizes = {"replica": 1, "fsdp": 4, "expert": 1, "tensor": 1, "context": 1}
    found = axis_traffic(model, TRAINING, sizes)
    assert found[("fsdp",)] == pytest.approx(3 * count * 4 * 3 / 4)
    assert sum(found.values()) == found[("fsdp",)]
    found = axis_traffic(model, TRAINING, sizes | {"fsdp": 1, "tensor": 2})
    # 3 passes, 2 sums of (16 rows, 64 tokens, 64) float32 in each of 3 layers; an all-reduce of 2 sends it once
    assert found[("tensor",)] == pytest.approx(3 * 2 * 3 * 16 * 64 * 64 * 4)


def test_a_search_ranks_what_fits_and_says_what_does_not():
    topology = replace(find_topology("cpu:8"), chip=CHIPS["NVIDIA H200"])
    ranked, reports = search(target(), topology, n_compiled=1)
    steps = [e.times.step_s for e in ranked]
    assert steps == sorted(steps)
    assert all(e.mesh["tensor"] <= 4 for e in ranked)  # 4 key heads
    assert reports[0].mesh == ranked[0].mesh
    tiny = replace(topology, chip=replace(CHIPS["NVIDIA H200"], hbm_bytes=1000))
    with pytest.raises(ConfigError, match="does not fit cpu:8 on any mesh"):
        search(target(), tiny)


def test_the_command_prints_one_json_object_for_a_recipe(capsys, monkeypatch):
    monkeypatch.setattr("efftrain.cli.aot.fake_devices", lambda n: None)
    small = ROOT / "tests" / "measure" / "small_aot_recipe.py"
    main(["aot", str(small), "cpu", "--topology", "cpu:8", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"]["fsdp"] == 8
    assert found["memory"]["parameters"] > 0
    assert found["target"] == "small_aot_recipe cpu"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["small_aot_recipe.py", "tpu"], "has no configuration 'tpu'; choose one of cpu"),
        (["test_aot.py"], "has no table `configs`"),
    ],
)
def test_a_recipe_that_cannot_be_compiled_is_one_sentence(capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr("efftrain.cli.aot.fake_devices", lambda n: None)
    with pytest.raises(SystemExit) as stop:
        main(["aot", str(ROOT / "tests" / "measure" / arguments[0]), *arguments[1:], "--topology", "cpu:8"])
    assert stop.value.code == 2
    out = capsys.readouterr()
    assert sentence in " ".join((out.out + out.err).split())
