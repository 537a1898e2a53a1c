"""Arrays that are written and read block by block are those that are written and read whole."""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from efftrain.errors import RunError
from efftrain.train.checkpoints import streamed_arrays
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.fingerprints import BlockFingerprint, fingerprints
from efftrain.train.checkpoints.streamed_arrays import StreamedArray, block_shape, blocks

SHAPES = [(), (0,), (7,), (5, 3), (3, 4, 6), (2, 3, 5, 4), (1, 1, 50)]
NAMES = {"params/blocks/0/mlp/up/kernel": (3, 4, 6), "params/embedding/table": (19, 5), "params/norm/scale": (5,)}


def random(shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).normal(size=shape).astype(dtype)


@pytest.fixture(params=[1, 50, 10**6])
def block_bytes(request, monkeypatch) -> int:
    monkeypatch.setattr(streamed_arrays, "BLOCK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_an_array_in_its_order_and_small(shape, block_bytes):
    array = random(shape)
    found = [array[index] for index in blocks(shape, block_shape(shape, 4))]
    row = 4 * shape[-1] if shape else 4
    assert all(block.nbytes <= max(block_bytes, row) for block in found)
    np.testing.assert_array_equal(np.concatenate([block.reshape(-1) for block in found] or [[]]), array.reshape(-1))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8, np.uint8])
@pytest.mark.parametrize("span", [3, 2**18])
def test_the_fingerprint_of_blocks_is_that_of_the_array(dtype, span, monkeypatch):
    monkeypatch.setattr("efftrain.train.checkpoints.fingerprints.SPAN", span)
    array = (20 * random((3, 4, 6))).astype(dtype)
    found = BlockFingerprint()
    for block in array:
        found.add(block)
    assert found.value == fingerprints({"": jnp.asarray(array)})[""]


def write(folder, arrays: dict[str, np.ndarray]) -> None:
    state = {n: StreamedArray.read_once(a.shape, a.dtype, lambda index, a=a: a[index]) for n, a in arrays.items()}
    with Checkpoints(folder, streamed=True) as checkpoints:
        checkpoints.save(0, state, None, None)


def model(arrays: dict[str, np.ndarray]) -> dict:
    return {name.removeprefix("params/"): jnp.asarray(array) for name, array in arrays.items()}


def test_what_is_written_in_blocks_is_read_whole_and_in_blocks(tmp_path, block_bytes):
    arrays = {name: random(shape) for name, shape in NAMES.items()}
    write(tmp_path / "c", arrays)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        whole = checkpoints.restore_model(model(arrays))
        for name, found in checkpoints.model_blocks(model(arrays)).items():
            wanted = arrays[f"params/{name}"]
            np.testing.assert_array_equal(whole[name], wanted)
            again = np.full_like(wanted, np.nan)
            n_blocks = 0
            for index, block in found:
                again[index], n_blocks = block, n_blocks + 1
            np.testing.assert_array_equal(again, wanted)
            assert n_blocks == len(list(blocks(wanted.shape, block_shape(wanted.shape, 4))))


def test_blocks_are_read_of_what_was_written_whole_or_sparsely(tmp_path):
    arrays = {name: random(shape) for name, shape in NAMES.items()}
    arrays["params/embedding/table"][:, 1:] = 0
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(3, {n: jnp.asarray(a) for n, a in arrays.items()}, None, None, squeezed=True)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        for name, found in checkpoints.model_blocks(model(arrays)).items():
            for index, block in found:
                np.testing.assert_array_equal(block, arrays[f"params/{name}"][index])


def test_a_block_that_differs_from_what_was_saved_is_noticed(tmp_path):
    """The second reading gives another number than the one of the fingerprint, as a damaged disk would."""
    arrays = {name: random(shape) for name, shape in NAMES.items()}
    table = arrays["params/embedding/table"]
    state = {n: StreamedArray.read_once(a.shape, a.dtype, lambda index, a=a: a[index]) for n, a in arrays.items()}
    table[18, 4] += 1
    with Checkpoints(tmp_path / "c", streamed=True) as checkpoints:
        checkpoints.save(0, state, None, None)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        found = checkpoints.model_blocks(model(arrays))["embedding/table"]
        with pytest.raises(RunError, match="embedding/table differs from what was saved"):
            list(found)


def test_a_number_that_is_not_finite_is_named_with_its_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_arrays, "BLOCK_BYTES", 100)
    arrays = {name: random(shape) for name, shape in NAMES.items()}
    arrays["params/blocks/0/mlp/up/kernel"][2, 1, 1] = np.nan
    write(tmp_path / "c", arrays)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        found = checkpoints.model_blocks(model(arrays))["blocks/0/mlp/up/kernel"]
        with pytest.raises(RunError, match="mlp/up/kernel of layer 2 holds numbers that are not finite"):
            list(found)
