"""Models of runs that are compressed in memory: as the functions for models do it, and the run stays as it is."""

import numpy as np
import pytest
from tiny_models import PLAIN, build, config
from tiny_runs import LENGTH, VOCABULARY, write_corpus, write_run

import efftrain
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.in_memory import convert_run, prune_run
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.pruning.one_shot import prune
from efftrain.compress.quantization.convert import convert
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.models.zeros import zeros_share
from efftrain.ops.masks import Unstructured
from efftrain.ops.number_formats import Integer

FOUR_BITS = Quantization(rules=(QuantizationRule(weights=Integer(bits=4)),))
MODEL = config(vocab_size=VOCABULARY, pattern=(PLAIN,), n_repeats=2, max_length=32)
HALF = Unstructured(sparsity=0.5)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def text(corpus):
    return CorpusRows(corpus.path, LENGTH)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "float", build(MODEL), corpus)


def test_a_conversion_needs_text_for_some_methods_only(run, text):
    pieces = LayerwiseModel.read
    rounded = convert(pieces(run), FOUR_BITS)[0](TOKENS)
    calibrated = convert(pieces(run), FOUR_BITS, method="gptq", calibration=text.calibration(8))[0](TOKENS)
    np.testing.assert_array_equal(convert_run(run, None, FOUR_BITS)(TOKENS), rounded)
    np.testing.assert_array_equal(convert_run(run, text, FOUR_BITS, "gptq", rows=8)(TOKENS), calibrated)
    assert np.abs(rounded - calibrated).max() > 1e-4
    assert not efftrain.load(run).config.quantization.rules


def test_without_rules_a_run_is_stored_as_it_was_trained(corpus, tmp_path):
    run = write_run(tmp_path / "trained", build(MODEL.replace(quantization=FOUR_BITS)), corpus)
    found = convert_run(run, None)
    assert found.config.quantization.stored
    np.testing.assert_allclose(found(TOKENS), efftrain.load(run)(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_pruning_at_once_is_that_of_the_model(run, text, method):
    calibration = text.calibration(8) if method == "wanda" else None
    expected = prune(LayerwiseModel.read(run), HALF, method=method, calibration=calibration)[0]
    found = prune_run(run, text, HALF, method, rows=8)
    np.testing.assert_array_equal(found(TOKENS), expected(TOKENS))
    assert zeros_share(found) == 0.5
    assert zeros_share(efftrain.load(run)) == 0
