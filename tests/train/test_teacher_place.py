"""Where a teacher's variables lie."""

import jax
import numpy as np
from flax import nnx

from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import DEFAULT_RULES
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.objectives.teacher import Teacher
from efftrain.train.run.directory import load_variables
from efftrain.train.state import split_model

MODEL = llama(vocab_size=64, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, max_length=16)


def test_it_is_split_over_devices_as_a_student_is():
    model, mesh = Decoder(MODEL, rngs=nnx.Rngs(0)), make_mesh(MeshConfig(fsdp=4, tensor=2))
    placed = Teacher.of(model).place(mesh, DEFAULT_RULES)
    up = placed["blocks"][0]["mlp"]["up"]["kernel"][...]
    assert up.sharding.shard_shape(up.shape) == (2, 4, 16)  # embed over fsdp, mlp over tensor
    assert len(up.sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, placed, nnx.state(model))


def test_it_comes_from_a_checkpoint_to_its_places(tmp_path):
    model, mesh = Decoder(MODEL, rngs=nnx.Rngs(1)), make_mesh(MeshConfig(fsdp=4, tensor=2))
    _, params, rest = split_model(model)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": params, "model_state": rest}, None, None)
        checkpoints.wait()
    teacher = Teacher(config=MODEL, restore=lambda abstract: load_variables(tmp_path / "checkpoints", abstract))
    placed = teacher.place(mesh, DEFAULT_RULES)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(placed)} == {8}
    jax.tree.map(np.testing.assert_array_equal, placed, nnx.state(model))
