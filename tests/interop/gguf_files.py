"""Writes small GGUF files with values of every type."""

from pathlib import Path

import gguf
import numpy as np

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
N_ROWS, N_COLUMNS = 4, 512


def stored(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Bytes (rows, bytes of a row) of random blocks with scales that are neither huge nor infinite."""
    values, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if kind == "F32":
        return rng.normal(size=(N_ROWS, N_COLUMNS)).astype(np.float32).view(np.uint8)
    if kind == "F16":
        return rng.normal(size=(N_ROWS, N_COLUMNS)).astype(np.float16).view(np.uint8)
    if kind == "BF16":
        return rng.normal(size=(N_ROWS, N_COLUMNS)).astype(np.float32).view(np.uint16)[:, 1::2].copy().view(np.uint8)
    blocks = rng.integers(0, 256, (N_ROWS * N_COLUMNS // values, n_bytes), dtype=np.uint8)
    scales = {"Q4_1": 2, "Q5_1": 2, "Q4_K": 2, "Q5_K": 2}.get(kind, 1)
    at = n_bytes - 2 if kind == "Q6_K" else 0
    halves = rng.normal(size=(len(blocks), scales)).astype(np.float16).view(np.uint8)
    blocks[:, at : at + 2 * scales] = halves
    return blocks.reshape(N_ROWS, -1)


def write_small(path: Path) -> Path:
    """Writes a file with several fields, and a tensor of every type that can be read, named after its type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "Ġ"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 0.0])
    rng = np.random.default_rng(0)
    for kind in TYPES:
        writer.add_tensor(f"{kind}.weight", stored(kind, rng), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("vector", np.arange(3, dtype=np.float32))
    write(writer)
    return path


def write(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
