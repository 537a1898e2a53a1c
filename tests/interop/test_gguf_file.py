"""GGUF files: values of every type by formula, the permutation of llama.cpp, and damaged files."""

import re
import struct
import sys
import time

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf_files import N_COLUMNS, N_ROWS, TYPES, stored, write

from efftrain.errors import ConfigError, ModelFileError
from efftrain.interop.gguf_file import GgufFile, interleaved_rows, llama_rows


def test_metadata_are_plain_values(small_gguf):
    file = GgufFile.open(small_gguf)
    assert file.architecture == "llama"
    assert file.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.tokens": ["a", "b", "Ġ"],
        "tokenizer.ggml.scores": [0.5, -1.0, 0.0],
    }
    assert type(file.metadata["llama.block_count"]) is int
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.smoke
def test_header_is_as_the_reader_of_the_package_reads_it(small_gguf):
    ours, theirs = GgufFile.open(small_gguf), gguf.GGUFReader(small_gguf)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(tensor.shape.tolist()[::-1])
        assert (mine.type, mine.offset, mine.n_bytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
    assert ours.tensors["Q4_K.weight"].shape == (N_ROWS, N_COLUMNS)


def half(raw: bytes, at: int) -> float:
    return float(np.frombuffer(raw[at : at + 2], np.float16)[0])


def six_bit(scales: bytes, j: int) -> tuple[int, int]:
    """Scale and minimum j of 8 in the 12 bytes of Q4_K and Q5_K."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4, (scales[j + 4] >> 4) | (scales[j] >> 6) << 4


def value(kind: str, raw: bytes, i: int) -> float:
    """Value i of a block, one at a time, by the layouts in ggml-common.h."""
    low = lambda at: raw[at + i] & 15 if i < 16 else raw[at + i - 16] >> 4  # noqa: E731
    high = lambda at: int.from_bytes(raw[at : at + 4], "little") >> i & 1  # noqa: E731
    match kind:
        case "Q4_0":
            return half(raw, 0) * (low(2) - 8)
        case "Q4_1":
            return half(raw, 0) * low(4) + half(raw, 2)
        case "Q5_0":
            return half(raw, 0) * ((low(6) | high(2) << 4) - 16)
        case "Q5_1":
            return half(raw, 0) * (low(8) | high(4) << 4) + half(raw, 2)
        case "Q8_0":
            return half(raw, 0) * int.from_bytes(raw[2 + i : 3 + i], "little", signed=True)
        case "Q4_K" | "Q5_K":
            scale, minimum = six_bit(raw[4:16], i // 32)
            codes = 16 if kind == "Q4_K" else 48
            code = raw[codes + i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15
            if kind == "Q5_K":
                code |= (raw[16 + i % 32] >> i // 32 & 1) << 4
            return half(raw, 0) * scale * code - half(raw, 2) * minimum
        case "Q6_K":
            part, j = divmod(i, 128)
            code = raw[part * 64 + j % 64] >> 4 * (j // 64) & 15
            code |= (raw[128 + part * 32 + j % 32] >> 2 * (j // 32) & 3) << 4
            return half(raw, 208) * int.from_bytes(raw[192 + i // 16 :][:1], "little", signed=True) * (code - 32)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.startswith("Q")])
def test_quantised_types_follow_their_formulas(small_gguf, kind):
    file, name = GgufFile.open(small_gguf), f"{kind}.weight"
    tensor, (values, n_bytes) = file.tensors[name], gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = small_gguf.read_bytes()[tensor.offset :][: tensor.n_bytes]
    blocks = [raw[at : at + n_bytes] for at in range(0, len(raw), n_bytes)]
    expected = np.array([value(kind, block, i) for block in blocks for i in range(values)]).reshape(tensor.shape)
    found = file.read(name)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_unquantised_types_keep_their_dtype(small_gguf):
    file = GgufFile.open(small_gguf)
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    for kind, dtype in dtypes.items():
        found = file.read(f"{kind}.weight")
        assert found.dtype == dtype
        assert found.shape == (N_ROWS, N_COLUMNS)
        assert 0.9 < found.astype(np.float32).std() < 1.1
    assert file.read("vector").tolist() == [0, 1, 2]


def permuted_by_llama_cpp(weights: np.ndarray, n_heads: int) -> np.ndarray:
    """``permute`` of convert_hf_to_gguf.py, with one loop a row."""
    d_head = len(weights) // n_heads
    rows = []
    for head in range(n_heads):
        for pair in range(d_head // 2):
            rows += [head * d_head + pair, head * d_head + pair + d_head // 2]
    return weights[rows]


@pytest.mark.parametrize("kind", TYPES)
def test_a_slice_along_the_first_axis_is_that_of_the_tensor(tmp_path, kind):
    """As an expert is read, of a tensor that holds all of them."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    rows = stored(kind, np.random.default_rng(1)).reshape(2, N_ROWS // 2, -1)
    writer.add_tensor("experts", rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    write(writer)
    file = GgufFile.open(tmp_path / "a.gguf")
    for index, whole in enumerate(file.read("experts")):
        np.testing.assert_array_equal(file.read("experts", index), whole)


@pytest.mark.parametrize("shape", [(24, 5), (24,)], ids=["weight", "bias"])
def test_permutation_of_queries_is_undone(shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    there = permuted_by_llama_cpp(array, n_heads=3)
    assert (there != array).any()
    np.testing.assert_array_equal(llama_rows(there, 3), array)
    np.testing.assert_array_equal(interleaved_rows(array, 3), there)


def test_rows_that_do_not_fit_the_heads_are_an_error():
    with pytest.raises(ModelFileError, match="24 rows of queries or keys cannot be divided among 5 heads"):
        llama_rows(np.zeros((24, 2)), 5)


def changed(path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


def stated(name: str, shape: tuple[int, ...], kind: int) -> bytes:
    """What the header states of a tensor, up to its offset."""
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    return head + struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<I", kind)


VECTOR = stated("vector", (3,), 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF\x03", b"GGML\x03", "is not a GGUF file"),
        (b"GGUF\x03", b"GGUF\x01", "has version 1 of GGUF, and only 2 and 3"),
        (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "has version 50331648 of GGUF"),
        (VECTOR, stated("vector", (0,), 0), "impossible for F32"),
        (VECTOR, stated("vector", (2**62,), 0), "and the file at"),
        (VECTOR, stated("vector", (2**64 - 1,), 0), "and the file at"),
        (VECTOR, stated("vector", (3,), 2), "impossible for Q4_0"),
        (VECTOR, stated("vector", (3,), 99), "unknown type 99"),
        (VECTOR, stated("vector", (3,), 4), "unknown type 4"),  # Q4_2, which was removed
        (VECTOR, VECTOR[:14] + struct.pack("<I", 9) + VECTOR[18:], "has 9 dimensions"),
        (VECTOR, VECTOR[:14] + struct.pack("<I", 0) + VECTOR[18:], "has 0 dimensions"),
        (VECTOR, b"\xff" * 8 + VECTOR[8:], "the file ends at byte"),
        (b"Q4_0.weight", b"Q4_1.weight"[:10] + b"\xff", "is not UTF-8"),
        (b"Q5_0.weight", b"Q8_0.weight", "'Q8_0.weight' is there twice"),
        (b"llama.block_count", b"general.architect", None),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.scores", "'tokenizer.ggml.scores' is there twice"),
    ],
)
def test_damaged_headers_are_one_sentence(small_gguf, old, new, message):
    changed(small_gguf, old, new)
    if message is None:
        assert GgufFile.open(small_gguf).metadata["general.architect"] == 2
        return
    with pytest.raises(ModelFileError, match=message) as caught:
        GgufFile.open(small_gguf)
    assert str(small_gguf) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "message"),
    [(2**64 - 32, "ends at byte"), (32 * 10**6, "ends at byte"), (33, "no multiple of the alignment"), (0, "overlap")],
)
def test_offsets_that_cannot_be_are_one_sentence(small_gguf, offset, message):
    content = small_gguf.read_bytes()
    at = content.index(VECTOR) + len(VECTOR)
    small_gguf.write_bytes(content[:at] + struct.pack("<Q", offset) + content[at + 8 :])
    with pytest.raises(ModelFileError, match=message):
        GgufFile.open(small_gguf)


def test_absurd_counts_end_at_once(small_gguf):
    content = small_gguf.read_bytes()
    list_of_tokens = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    start = time.perf_counter()
    for at, message in ((8, "tensors, more than"), (16, "fields, more than"), (list_of_tokens, "entries in")):
        small_gguf.write_bytes(content[:at] + struct.pack("<Q", 2**60) + content[at + 8 :])
        with pytest.raises(ModelFileError, match=message):
            GgufFile.open(small_gguf)
    assert time.perf_counter() - start < 5


def test_truncated_files_are_one_sentence(small_gguf):
    content = small_gguf.read_bytes()
    end_of_header = GgufFile.open(small_gguf).tensors["F32.weight"].offset
    for length in [*range(end_of_header), *range(end_of_header, len(content) - 20, 997)]:
        small_gguf.write_bytes(content[:length])
        with pytest.raises(ModelFileError, match=r"not a GGUF file|damaged or incomplete|is empty"):
            GgufFile.open(small_gguf)


def test_flipped_bytes_of_the_header_never_give_a_traceback(small_gguf):
    content = small_gguf.read_bytes()
    end_of_header = GgufFile.open(small_gguf).tensors["F32.weight"].offset
    rng = np.random.default_rng(1)
    messages = []
    for _ in range(3000):
        flipped = bytearray(content)
        for at in rng.integers(0, end_of_header, rng.integers(1, 4)):
            flipped[at] = rng.integers(256)
        small_gguf.write_bytes(flipped)
        try:
            file = GgufFile.open(small_gguf)
            assert isinstance(file.architecture, str)
            for name in file.tensors:
                file.read(name)
        except ModelFileError as error:
            messages.append(str(error))
    assert len(messages) > 500
    assert all(str(small_gguf) in message for message in messages)


def test_what_cannot_be_opened_is_one_sentence(tmp_path):
    (tmp_path / "empty.gguf").touch()
    for name, message in (("empty.gguf", "is empty"), ("none.gguf", "cannot be read"), (".", "cannot be read")):
        with pytest.raises(ModelFileError, match=message):
            GgufFile.open(tmp_path / name)


def test_missing_package_is_one_sentence_with_the_command(small_gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=re.escape("install it with: pip install 'efftrain[interop]'")):
        GgufFile.open(small_gguf)


def test_unreadable_types_and_missing_names_are_one_sentence(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", np.zeros((1, 66), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    write(writer)
    file = GgufFile.open(tmp_path / "m.gguf")
    assert file.tensors["w"].shape == (1, 256)
    with pytest.raises(ModelFileError, match="has the type IQ2_XXS, and only F32, F16"):
        file.read("w")
    with pytest.raises(ModelFileError, match="has no tensor 'v'"):
        file.read("v")


def test_one_part_of_several_is_not_a_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    write(writer)
    with pytest.raises(ModelFileError, match="one of 3 files of a model; merge them with: llama-gguf-split"):
        GgufFile.open(tmp_path / "m.gguf")


@pytest.mark.pretrained
def test_published_file_is_as_the_reader_of_the_package_reads_it(smollm2):
    ours, theirs = GgufFile.open(smollm2), gguf.GGUFReader(smollm2)
    for name, found in ours.metadata.items():
        assert found == theirs.fields[name].contents(), name
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.read(tensor.name), expected)
