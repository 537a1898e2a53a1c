"""Export to GGUF: what is written can be read, quantised blocks come back bit by bit, nothing half-written stays."""

import gguf
import numpy as np
import pytest

from efftrain.errors import ConfigError, ModelFileError
from efftrain.interop.gguf_export import ExportTensor, write_gguf
from efftrain.interop.gguf_file import GgufFile

TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")
# The largest error of a type: half a step of the coarsest block, and the rounding of its 16-bit scale.
LARGEST_ERROR = {"F32": 0, "F16": 2e-3, "Q8_0": 0.02, "Q4_0": 0.5, "Q4_1": 0.3}


def values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(6, 96)).astype(np.float32).clip(-3, 3)


def tensor(kind, array, name="w") -> ExportTensor:
    return ExportTensor(name, array.shape, kind, lambda: array)


@pytest.mark.parametrize("kind", TYPES)
def test_tensors_come_back_within_the_error_of_their_type_and_then_bit_by_bit(tmp_path, kind):
    write_gguf(tmp_path / "a.gguf", "llama", {}, {}, [tensor(kind, values())])
    first = GgufFile.open(tmp_path / "a.gguf")
    read = first.read("w")
    assert first.tensors["w"].type == kind
    assert np.abs(read - values()).max() <= LARGEST_ERROR[kind]
    write_gguf(tmp_path / "b.gguf", "llama", {}, {}, [tensor(kind, read)])
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_fields_come_back_with_the_types_of_llama_cpp(tmp_path):
    fields = {
        "general.name": "a model",
        "llama.block_count": 2,
        "llama.negative": -1,
        "llama.rope.freq_base": 10000.0,
        "llama.large": 1e300,
        "general.alignment": 64,  # of the file from which the fields come; the writer has its own
        "general.languages": ["en", "de"],
    }
    tokenizer = {
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.scores": [0.5, -1.0],
        "tokenizer.ggml.token_type": [1, 3],
        "tokenizer.chat_template": "{{ messages }}",
    }
    write_gguf(tmp_path / "a.gguf", "llama", fields, tokenizer, [tensor("Q8_0", values())])
    found = dict(GgufFile.open(tmp_path / "a.gguf").metadata)
    assert found.pop("general.architecture") == "llama"
    assert found.pop("general.quantization_version") == 2
    assert found == {name: v for name, v in {**fields, **tokenizer}.items() if name != "general.alignment"}
    types = {name: field.types for name, field in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}
    kind = gguf.GGUFValueType
    assert types["llama.block_count"] == [kind.UINT32]
    assert types["llama.rope.freq_base"] == [kind.FLOAT32]
    assert types["tokenizer.ggml.scores"] == [kind.ARRAY, kind.FLOAT32]
    assert types["tokenizer.ggml.token_type"] == [kind.ARRAY, kind.INT32]


def test_tensors_are_read_one_after_another(tmp_path):
    events = []

    def read(name):
        events.append((name, (tmp_path / "a.gguf.incomplete").stat().st_size > 0))
        return values()

    tensors = [ExportTensor(name, (6, 96), "F16", lambda name=name: read(name)) for name in "abc"]
    write_gguf(tmp_path / "a.gguf", "llama", {}, {}, iter(tensors))
    assert events == [("a", True), ("b", True), ("c", True)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_what_fails_leaves_the_file_of_before(tmp_path):
    write_gguf(tmp_path / "a.gguf", "llama", {}, {}, [tensor("F32", values())])
    before = (tmp_path / "a.gguf").read_bytes()

    def fail():
        raise RuntimeError("no values")

    with pytest.raises(RuntimeError, match="no values"):
        write_gguf(tmp_path / "a.gguf", "llama", {}, {}, [ExportTensor("w", (2, 2), "F32", fail)])
    assert (tmp_path / "a.gguf").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        ("Q4_1", np.zeros((2, 33)), "needs rows of a multiple of 32 values; choose F16 or F32"),
        ("Q6_K", np.zeros((2, 256)), "cannot be written as Q6_K; choose F32, F16, Q8_0, Q4_0, Q4_1"),
        ("F32", np.zeros((0, 3)), "cannot be written as F32"),
        ("F16", np.full((1, 2), 1e6), "has the value 1000000.0, which F16 cannot hold"),
        ("Q8_0", np.full((1, 32), np.nan), "has the value nan, which Q8_0 cannot hold"),
        ("F32", np.full((1, 2), np.inf), "has the value inf, which F32 cannot hold"),
    ],
)
def test_what_a_type_cannot_hold_is_one_sentence(tmp_path, kind, array, message):
    with pytest.raises(ConfigError, match=message):
        write_gguf(tmp_path / "a.gguf", "llama", {}, {}, [tensor(kind, array)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [None, [], [1, "a"], [None], {"a": 1}, 2**70, b"bytes"])
def test_fields_that_gguf_cannot_hold_are_one_sentence(tmp_path, value):
    with pytest.raises(ConfigError, match=r"the field 'general\.x'"):
        write_gguf(tmp_path / "a.gguf", "llama", {"general.x": value}, {}, [])


def test_names_twice_other_shapes_and_missing_folders_are_one_sentence(tmp_path):
    two = [tensor("F32", values()), tensor("F16", values())]
    with pytest.raises(ConfigError, match="'w' is given twice"):
        write_gguf(tmp_path / "a.gguf", "llama", {}, {}, two)
    other = ExportTensor("w", (96, 6), "F32", values)
    with pytest.raises(ConfigError, match=r"has the shape \(6, 96\) and was planned as \(96, 6\)"):
        write_gguf(tmp_path / "a.gguf", "llama", {}, {}, [other])
    with pytest.raises(ModelFileError, match=r"cannot write .*; free disk space or choose another path"):
        write_gguf(tmp_path / "none" / "a.gguf", "llama", {}, {}, [])


@pytest.mark.pretrained
def test_published_model_comes_back_bit_by_bit_from_its_dequantised_values(tmp_path, smollm2):
    source = GgufFile.open(smollm2)
    tensors = [
        ExportTensor(name, found.shape, found.type, lambda name=name: source.read(name))
        for name, found in source.tensors.items()
    ]
    write_gguf(tmp_path / "again.gguf", source.architecture, source.metadata, {}, tensors)
    again = GgufFile.open(tmp_path / "again.gguf")
    assert again.metadata == source.metadata
    old, new = smollm2.read_bytes(), (tmp_path / "again.gguf").read_bytes()
    for name, one in source.tensors.items():
        other = again.tensors[name]
        assert new[other.offset : other.offset + other.n_bytes] == old[one.offset : one.offset + one.n_bytes], name
