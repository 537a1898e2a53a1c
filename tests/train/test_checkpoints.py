"""Checkpoints: what is in them is what was, damaged ones are noticed, and any mesh can read them."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from efftrain.errors import RunError
from efftrain.models.config import BlockConfig, Dense
from efftrain.models.decoder import Decoder
from efftrain.sharding.layout import state_shardings, with_shardings
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.train import loop
from efftrain.train.checkpoints import fingerprints as fingerprints_module
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.fingerprints import fingerprints
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.optimizers import with_clipping
from efftrain.train.run.directory import Run, load
from efftrain.train.state import init_state

# Late callbacks of tensorstore, which a run keeps from its user; pytest sees them before.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def largest_file(directory: Path) -> Path:
    """Where the arrays are."""
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(step: Path) -> None:
    path = largest_file(step / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_all(step: Path) -> None:
    """Each file that can hold arrays: which of them holds the model's differs from save to save."""
    for path in (step / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_an_array_file(step: Path) -> None:
    largest_file(step / "state").unlink()


def delete_the_data_item(step: Path) -> None:
    shutil.rmtree(step / "data")


def flip_one_bit_of_an_array(step: Path) -> None:
    """In the largest of them all, the last byte of its chunk: nothing but a checksum can see it."""
    path = largest_file(step / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def alter_the_iterator(step: Path) -> None:
    (path,) = [p for p in (step / "data").rglob("*") if p.is_file() and b'"taken": 6' in p.read_bytes()]
    path.write_text(path.read_text().replace('"taken": 6', '"taken": 5'))


DAMAGE = [truncate, delete_an_array_file, delete_the_data_item, flip_one_bit_of_an_array, alter_the_iterator]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(crashed, damage, capsys, ends_like):
    damage(crashed / "checkpoints" / "6")
    fitted = tiny.train(crashed)
    said = capsys.readouterr().err
    assert f"warning: checkpoint {crashed / 'checkpoints' / '6'} is damaged" in said
    assert "continuing from step 3" in said
    ends_like(crashed, fitted)
    assert (crashed / "damaged" / "6").is_dir()  # kept: perhaps only the reading failed
    assert sorted(p.name for p in (crashed / "checkpoints").iterdir()) == ["6", "8"]


def test_where_every_checkpoint_is_damaged_nothing_is_lost(crashed, capsys):
    for step in ("3", "6"):
        truncate_all(crashed / "checkpoints" / step)
    before = (crashed / "metrics.jsonl").read_bytes()
    for use in (tiny.train, load):
        with pytest.raises(RunError, match=r"no checkpoint in .* can be read \(damaged: 6, 3\).* --out"):
            use(crashed)
    assert {p.name for p in (crashed / "checkpoints").iterdir()} == {"3", "6"}
    assert (crashed / "metrics.jsonl").read_bytes() == before


def test_what_an_interrupted_save_left_is_ignored_and_tidied(crashed, ends_like, capsys):
    partial = crashed / "checkpoints" / "7.orbax-checkpoint-tmp"
    shutil.copytree(crashed / "checkpoints" / "6", partial)
    (partial / "_CHECKPOINT_METADATA").unlink()
    load(crashed)
    assert partial.exists()  # a reader tidies nothing: the writer may be at work
    fitted = tiny.train(crashed)
    assert "continuing from step 6" in capsys.readouterr().err
    ends_like(crashed, fitted)
    assert sorted(p.name for p in (crashed / "checkpoints").iterdir()) == ["6", "8"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run with every state that was saved, and a copy of it from just before the save."""
    seen = {}

    class Watched(Checkpoints):
        def save(self, step, state, *rest):
            copy = {name: np.array(leaf, copy=True) for name, leaf in flatten(state).items()}
            seen[step] = (state, copy)
            super().save(step, state, *rest)

    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "Checkpoints", Watched)
    out = tmp_path_factory.mktemp("watched") / "run"
    with patch.context():
        tiny.train(out, steps=6, checkpoint_every=1, keep_checkpoints=6, ema_decay=0.9)
    patch.undo()
    return out, seen


def test_a_checkpoint_holds_the_state_of_its_step_though_training_went_on(watched):
    out, seen = watched
    with Checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3, 4, 5, 6]
        for step, (_, want) in seen.items():
            got, data = checkpoints._read(step, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in want.items()})
            assert data == {"taken": step}
            assert got.keys() == want.keys()
            for name in want:
                np.testing.assert_array_equal(got[name], want[name], err_msg=f"{name} of step {step}")
    assert np.abs(seen[1][1]["params/head/kernel"] - seen[2][1]["params/head/kernel"]).max() > 1e-4


def test_a_save_does_not_alias_memory_that_is_written_again(tmp_path):
    """Big arrays, donated and overwritten at once after each save."""
    overwrite = jax.jit(lambda x: x * -1.5, donate_argnums=0)
    sharding = NamedSharding(make_mesh(MeshConfig(fsdp=8)), PartitionSpec("fsdp"))
    for name, place in {"one": jax.devices()[0], "eight": sharding}.items():
        x = jax.device_put(np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32), place)
        copies = []
        with Checkpoints(tmp_path / name) as checkpoints:
            for step in range(4):
                copies.append(np.array(x, copy=True))
                checkpoints.save(step, {"x": x}, None, None)
                for _ in range(3):
                    x = overwrite(x)
            checkpoints.wait()
            for step, want in enumerate(copies):
                got, _ = checkpoints._read(step, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
                np.testing.assert_array_equal(got["x"], want)


def test_the_loop_donates_its_state(tmp_path, monkeypatch):
    """Without a save: on CPU, where Orbax reads the arrays in place, the step after one copies instead."""
    states = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, state, *rest: states.append(state))
    tiny.train(tmp_path / "run", steps=4, checkpoint_every=1)
    gone = [{leaf.is_deleted() for leaf in jax.tree.leaves(state)} for state in states]
    assert gone == [{True}, {True}, {True}, {False}]


def test_names_say_where_a_leaf_is(unbroken):
    names = flatten(nnx.state(unbroken[1].model)).keys()
    attention = {f"blocks/0/attention/{part}/kernel" for part in ("query", "key", "value", "out")}
    assert names >= {"embedding/table", "norm/scale", "head/kernel"} | attention


def test_only_the_newest_checkpoints_stay(unbroken):
    assert sorted(p.name for p in (unbroken[0] / "checkpoints").iterdir()) == ["6", "8"]


QK_NORMED = BlockConfig(attention=dataclasses.replace(tiny.ATTENTION, qk_norm=True), mlp=Dense(d_ff=32))
OTHER_MODELS = {
    r"params/\S+: '\(.*\)' -> '\(.*\)' and \d+ more": tiny.MODEL.replace(d_model=32),
    r"params/blocks/0/attention/key_norm/scale: None -> '\(2, 4\)'": tiny.MODEL.replace(pattern=(QK_NORMED,)),
}


@pytest.mark.parametrize("difference", OTHER_MODELS)
def test_a_checkpoint_of_another_model_names_a_parameter(crashed, tmp_path, difference):
    other = OTHER_MODELS[difference]
    run = Run(tmp_path / "other", tiny.Config(model=other))
    shutil.copytree(crashed / "checkpoints", run.path / "checkpoints")
    for use in (lambda out: tiny.train(out, model=other), load):
        with pytest.raises(
            RunError, match=rf"checkpoints/6 is a checkpoint of another model or optimizer: {difference}"
        ):
            use(run.path)
    assert {p.name for p in (run.path / "checkpoints").iterdir()} == {"3", "6"}


def test_fingerprints_are_dispatched_all_and_fetched_once(monkeypatch):
    dispatched, fetched = [], []
    one, fetch = fingerprints_module._fingerprint, jax.device_get
    monkeypatch.setattr(fingerprints_module, "_fingerprint", lambda x: dispatched.append(x.shape) or one(x))
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(len(dispatched)) or fetch(tree))
    assert len(fingerprints({str(n): jnp.ones(n) for n in range(1, 5)})) == 4
    assert fetched == [4]


def test_fingerprints_see_every_bit_and_no_sharding():
    x = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    want = fingerprints({"x": jnp.asarray(x)})
    spread = NamedSharding(make_mesh(MeshConfig(fsdp=4, tensor=2)), PartitionSpec("tensor", "fsdp"))
    assert fingerprints({"x": jax.device_put(x, spread)}) == want
    for place, bit in ((0, 0), (5, 31), (95, 7)):
        other = x.copy()
        other.reshape(-1).view(np.uint32)[place] ^= np.uint32(1) << np.uint32(bit)
        assert fingerprints({"x": jnp.asarray(other)}) != want
    assert fingerprints({"x": jnp.asarray(x[::-1])}) != want
    by_hand = (x.view(np.uint32).astype(np.uint64).reshape(-1) * (2 * np.arange(96, dtype=np.uint64) + 1)).sum()
    assert want == {"x": int(by_hand % 2**32)}
    for dtype in (jnp.bfloat16, jnp.int32, jnp.bool_, jnp.uint8):
        assert fingerprints({"x": jnp.ones((3,), dtype)}) != fingerprints({"x": jnp.zeros((3,), dtype)})


@pytest.fixture(scope="module")
def spread_run(tmp_path_factory):
    """Four steps of eight on a mesh of 4 x 2 (fsdp x tensor), with the parameters as they were saved."""
    out = tmp_path_factory.mktemp("spread") / "run"
    with pytest.raises(tiny.Crash):
        tiny.train(out, tiny.Walks(crash_at=5), devices=8, mesh=MeshConfig(fsdp=4, tensor=2), checkpoint_every=4)
    return out


def test_the_loss_on_eight_devices_is_that_on_one(spread_run, unbroken):
    rows = read_metrics(spread_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, want in zip(rows, read_metrics(unbroken[0]), strict=False):
        assert row["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], abs=1e-4)


MESHES = {
    "one device": (1, MeshConfig()),
    "2 x 4": (8, MeshConfig(fsdp=2, tensor=4)),
    "replicas": (8, MeshConfig(replica=8, fsdp=1)),
}


@pytest.mark.parametrize("name", MESHES)
def test_a_checkpoint_is_read_onto_any_mesh(spread_run, name):
    devices, mesh_config = MESHES[name]
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    optimizer = with_clipping(tiny.TRAINING.optimizer.build(lambda step: 1.0), 1.0)
    abstract = jax.eval_shape(
        lambda: init_state(lambda rngs: Decoder(tiny.MODEL, rngs=rngs), optimizer, seed=0, ema=False)
    )
    shardings = state_shardings(abstract, mesh)
    with Checkpoints(spread_run / "checkpoints", read_only=True) as checkpoints:
        step, state, data = checkpoints.restore(with_shardings(abstract, shardings))
    assert (step, data, int(state.step)) == (4, {"taken": 4}, 4)
    jax.tree.map(lambda array, sharding: _assert_placed(array, sharding), state, shardings)
    for path, want in tiny.parameters(load(spread_run)).items():
        np.testing.assert_array_equal(flatten(state.params)[path], want, err_msg=path)


def _assert_placed(array, sharding) -> None:
    assert array.sharding.is_equivalent_to(sharding, array.ndim)


@pytest.mark.parametrize("name", ["one device", "2 x 4"])
def test_a_run_continues_on_another_mesh(spread_run, unbroken, tmp_path, name):
    devices, mesh = MESHES[name]
    out = Path(shutil.copytree(spread_run, tmp_path / "run"))
    fitted = tiny.train(out, devices=devices, mesh=mesh)
    for row, want in zip(read_metrics(out), read_metrics(unbroken[0]), strict=True):
        assert row["loss"] == pytest.approx(want["loss"], abs=1e-5)
    tiny.assert_same_parameters(fitted.model, unbroken[1].model, atol=1e-4)
