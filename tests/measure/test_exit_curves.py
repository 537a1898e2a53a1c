"""What a calibration of depth takes from its rows: valid tokens alone, and how many they were."""

import numpy as np
import pytest
from tiny_models import PLAIN, build, config, rows, tokens

from efftrain.measure.depth.exit_curves import QUANTILES, RULES, TokenTable, full_choices, measure_exit, tune
from efftrain.measure.quality.row_documents import with_documents
from efftrain.models.depth.early_exit import ConfidenceExit, ExitProbe


@pytest.fixture(scope="module")
def model():
    return build(config(pattern=(PLAIN,), n_repeats=2))


@pytest.fixture(scope="module")
def batches():
    """Two batches of two rows; the second row of the last one is padding, and the first ends early."""
    found = [rows(tokens(2, 12, seed=seed)) for seed in (1, 2)]
    found[1]["segments"] *= np.array([[1], [0]], np.int32)
    found[1]["segments"][0, 7:] = 0
    found[1]["mask"] = found[1]["segments"] > 0
    return found


def test_thresholds_and_probe_are_from_valid_tokens_and_say_from_how_many(model, batches):
    similarities = []
    for batch in batches:
        x = model.embedding(batch["tokens"])
        y = np.asarray(model.layers()[0](x, batch["positions"], batch["segments"])[0], np.float64)
        x = np.asarray(x, np.float64)
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        similarities.append(cosine[batch["mask"]])
    found = tune(model, batches)
    assert found["tokens"] == sum(batch["mask"].sum() for batch in batches) == 22 + 7
    expected = np.quantile(np.concatenate(similarities), QUANTILES)
    np.testing.assert_allclose(found["thresholds"]["similarity"], expected, atol=1e-4)
    assert found["thresholds"].keys() == set(RULES)
    probe = ExitProbe(**{name: np.asarray(values, np.float32) for name, values in found["probe"].items()})
    text = TokenTable(np.zeros(29, np.int32), np.ones(29))
    of_documents = with_documents(batches, end_of_text_id=0)
    full = full_choices(model, of_documents)
    point = measure_exit(model, of_documents, full, text, ConfidenceExit(rule="similarity"), 2.0, probe)
    assert point["tokens"] == found["tokens"]
    assert point["mean_depth"] == 2
