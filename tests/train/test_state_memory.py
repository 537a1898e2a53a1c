"""No device holds a whole parameter: not while the state is made, not when it is restored."""

import jax
import tiny

from efftrain.models.decoder import Decoder
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import use
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.program import make_program

MODEL = tiny.MODEL.replace(vocab_size=4096, d_model=64)  # an embedding of 1 MiB, larger than all that is replicated
LARGEST = 4096 * 64 * 4


def parts():
    mesh = make_mesh(MeshConfig(fsdp=8))
    program = make_program(lambda rngs: Decoder(MODEL, rngs=rngs), next_token_loss, tiny.TRAINING)
    return mesh, program, program.abstract_state(mesh)


def test_making_the_state_needs_an_eighth_of_the_largest_parameter_on_each_device():
    mesh, program, abstract = parts()
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    with use(mesh):
        compiled = jax.jit(program.init, out_shardings=shardings).lower().compile()
    memory = compiled.memory_analysis()
    assert max(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)) == LARGEST
    assert memory.output_size_in_bytes < whole / 8 * 1.2
    assert memory.temp_size_in_bytes < LARGEST
    on_one = jax.jit(program.init).lower().compile().memory_analysis()  # the analysis is of one device, and not blind
    assert on_one.output_size_in_bytes >= whole


def test_saving_and_restoring_keep_every_large_array_in_eighths(tmp_path):
    mesh, program, abstract = parts()
    with use(mesh):
        state = jax.jit(program.init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, None, None)
        checkpoints.wait()
        before = {id(array) for array in jax.live_arrays()}
        _, restored, _ = checkpoints.restore(abstract)
    for name, array in flatten(restored).items():
        if array.nbytes == LARGEST:
            assert {shard.data.nbytes for shard in array.addressable_shards} == {LARGEST // 8}, name
    fresh = [a for a in jax.live_arrays() if id(a) not in before]
    largest = max(shard.data.nbytes for array in fresh for shard in array.addressable_shards)
    assert largest < LARGEST
