"""The risk bound against simulation, and the order of its tests."""

import numpy as np
import pytest

from efftrain.data.storage.packing import row
from efftrain.measure.depth.risk import documents_needed, last_safe, p_value
from efftrain.measure.quality.row_documents import after_tuning, count_documents, losses_by_document, with_documents


@pytest.mark.parametrize(("mean", "n"), [(0.05, 60), (0.2, 40), (0.5, 100)])
@pytest.mark.parametrize("graded", [False, True])
def test_a_mean_at_the_bound_is_rarely_called_lower(mean, n, graded):
    """10,000 samples whose true mean is the bound: at 10 %, at most about a tenth may have a small p-value."""
    rng = np.random.default_rng(0)
    draws = rng.beta(2 * mean, 2 * (1 - mean), (10_000, n)) if graded else rng.random((10_000, n)) < mean
    wrong = np.mean([p_value(losses, mean) <= 0.1 for losses in draws[:2000]])
    assert wrong <= 0.1 + 0.02


def test_a_mean_well_below_is_told_and_one_above_is_not():
    rng = np.random.default_rng(1)
    assert p_value(rng.random(200) < 0.01, 0.1) < 0.01
    assert p_value(rng.random(200) < 0.3, 0.1) == 1
    assert p_value([0.0] * 10, 0.1) > p_value([0.0] * 100, 0.1)  # more samples, more certainty


def test_the_tests_stop_at_the_first_that_fails():
    safe, bad = [0.0] * 200, [0.5] * 200
    assert last_safe([safe, safe, bad, safe], 0.1, 0.05) == 1
    assert last_safe([bad, safe], 0.1, 0.05) is None
    assert last_safe([safe, safe], 0.1, 0.05) == 1


def test_rows_of_one_document_are_one_sample():
    """Documents of 8 identical rows whose mean loss is exactly the bound: at a nominal 5 %, 5 % are called safe.

    With the rows as samples it is 13 % and more, as the same losses count eightfold.
    """
    rng, n_documents, n_rows, length, bound = np.random.default_rng(0), 40, 8, 4, 0.1
    documents = np.repeat(np.arange(n_documents), n_rows).reshape(-1, 1) * np.ones((1, length), int)
    everywhere = np.ones(documents.shape, bool)
    safe = {"documents": 0, "rows": 0}
    for _ in range(2000):
        of_document = rng.random(n_documents) < bound
        differs = of_document[documents]
        losses = losses_by_document(differs, everywhere, documents)
        np.testing.assert_array_equal(losses, of_document)
        safe["documents"] += p_value(losses, bound) <= 0.05
        safe["rows"] += p_value(differs.mean(1), bound) <= 0.05
    assert safe["documents"] / 2000 <= 0.05
    assert safe["rows"] / 2000 > 0.1


def rows_of(lengths: list[int], length: int, size: int) -> list[dict[str, np.ndarray]]:
    """Batches of the consecutive rows of a stream of documents: token 0, then ones."""
    stream = np.concatenate([np.r_[0, np.ones(n - 1, np.int32)] for n in lengths]).astype(np.int32)
    rows = [row(stream[i : i + length + 1], length, end_of_text_id=0) for i in range(0, len(stream) - 1, length)]
    return [
        {name: np.stack([r[name] for r in rows[i : i + size]]) for name in rows[0]} for i in range(0, len(rows), size)
    ]


def test_documents_are_found_through_rows_and_within_them():
    """Of 3, 11, 2, 2 and 6 tokens in rows of 4: some rows hold several documents, and one document several rows."""
    lengths = [3, 11, 2, 2, 6, 3]
    rows = with_documents(rows_of(lengths, 4, 2), 0)
    numbers = np.concatenate([r["documents"] for r in rows]).reshape(-1)
    np.testing.assert_array_equal(numbers, [*np.repeat(np.arange(1, 7), lengths), -1])
    assert [len(r["tokens"]) for r in rows] == [2, 2, 2, 1]
    # The second document began in the first batch, and is not held out; the last target is that of the last but one.
    held_out = after_tuning(rows, 1)
    assert count_documents(rows) == 6
    assert count_documents(held_out) == 4
    assert set(np.concatenate([r["documents"] for r in held_out]).reshape(-1)) == {-1, 3, 4, 5, 6}


def test_a_documents_loss_is_the_share_of_its_tokens():
    documents = np.array([[1, 1, 1, 2], [2, 2, 3, -1]])
    differs = np.array([[True, False, True, True], [True, False, True, True]])
    counted = np.array([[True, True, False, True], [True, True, False, False]])
    np.testing.assert_allclose(losses_by_document(differs, counted, documents), [1 / 2, 2 / 3])


@pytest.mark.parametrize(("bound", "error"), [(0.1, 0.05), (0.5, 0.1), (0.9, 0.5)])
def test_so_many_documents_without_a_loss_are_needed(bound, error):
    """Of n such, even of independent ones, a mean at the bound gives none with probability (1 - bound) ** n."""
    n = documents_needed(bound, error)
    assert p_value([0.0] * n, bound) <= error < (p_value([0.0] * (n - 1), bound) if n > 1 else 1)
    assert (1 - bound) ** n <= error
