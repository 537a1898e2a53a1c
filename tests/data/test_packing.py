import numpy as np
import pytest

from efftrain.data.storage.packing import blocks, padding, row


def reference(stream: list[int], start: int, length: int, end: int) -> dict[str, list]:
    """The row that begins at ``start``, one token at a time."""
    out = {"tokens": [], "targets": [], "segments": [], "positions": [], "mask": []}
    segment = position = 0
    for i in range(start, start + length):
        if i >= len(stream):
            token, target, shown, at, known = 0, 0, 0, 0, False
        else:
            token = stream[i]
            if token == end or i == start:
                segment, position = segment + 1, 0
            else:
                position += 1
            shown, at, known = segment, position, i + 1 < len(stream)
            target = stream[i + 1] if known else 0
        for name, value in zip(out, (token, target, shown, at, known), strict=True):
            out[name].append(value)
    return out


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length", [1, 7, 16, 64])
@pytest.mark.parametrize("end", [0, 5])
def test_rows_equal_a_reference_written_one_token_at_a_time(seed, length, end):
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, 6, size=50).astype(np.int32)  # the end of text often comes twice in a row
    stream[0] = end
    for start in range(0, 50, length):
        found = row(stream[start : start + length + 1], length, end_of_text_id=end)
        for name, expected in reference(stream.tolist(), start, length, end).items():
            assert found[name].tolist() == expected, name
            assert found[name].dtype == (bool if name == "mask" else np.int32)


def test_a_row_of_padding_counts_for_nothing():
    empty = padding(5)
    assert not empty["mask"].any()
    assert not empty["segments"].any()


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
def test_blocks_are_the_concatenation_cut_into_pieces(size):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 9, size=n) for n in (1, 40, 0, 3, 8, 8, 5)]
    found = list(blocks(documents, size))
    assert np.concatenate(found).tolist() == np.concatenate(documents).tolist()
    assert all(len(piece) == size for piece in found[:-1])
    assert 0 < len(found[-1]) <= size


def test_no_document_gives_no_block():
    assert list(blocks([], 8)) == []
