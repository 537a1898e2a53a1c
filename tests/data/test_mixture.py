import io
from dataclasses import replace

import pytest
from rich.console import Console

from efftrain import data
from efftrain.data.loading import mixture
from efftrain.data.loading.loader import LoaderConfig, Part, batches
from efftrain.data.loading.mixture import epochs, show_mixture
from efftrain.errors import ConfigError, CorpusError


def test_epochs_of_a_mixture():
    """1,000 tokens as 3 : 1 are 750 and 250; of 250 and 1,000 tokens these are three epochs and a quarter."""
    assert epochs([3, 1], [250, 1000], 1000) == [3.0, 0.25]
    assert epochs([0.3, 0.1], [250, 1000], 1000) == pytest.approx([3.0, 0.25])
    assert epochs([7], [10], 45) == [4.5]
    with pytest.raises(ConfigError, match="0 tokens"):
        epochs([1], [0], 10)


@pytest.fixture(scope="module")
def second(tmp_path_factory, documents, config_for, corpus):
    """Another corpus with the same tokenizer."""
    config = config_for(documents, tokenizer=corpus.path / "tokenizer.json", seed=5)
    return data.build(config, tmp_path_factory.mktemp("corpora") / "second")


@pytest.fixture
def shown(monkeypatch) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(mixture, "console", Console(file=out, width=200))
    return out


def test_epochs_agree_with_what_the_loader_reads(corpus, second):
    """Counts the rows of each part in as many batches as the budget has."""
    config = LoaderConfig(corpora=(Part(path=corpus.path, weight=3.0), Part(path=second.path)), length=16, batch_size=4)
    n_batches = 2000
    n_tokens = n_batches * config.length * config.batch_size
    one, _ = epochs([3.0, 1.0], [corpus.n_tokens("train"), second.n_tokens("train")], n_tokens)
    first_row = next(batches(replace(config, corpora=config.corpora[:1], shuffle=False)))["tokens"][0].tolist()
    loader = batches(replace(config, shuffle=False))
    n_seen = sum(row == first_row for _ in range(n_batches) for row in next(loader)["tokens"].tolist())
    rows_per_epoch = -(-(corpus.n_tokens("train") - 1) // config.length)
    assert n_seen == pytest.approx(one, abs=1 + 1 / rows_per_epoch)


def test_the_table_names_each_corpus_and_warns_above_four_epochs(corpus, second, shown):
    config = LoaderConfig(corpora=(Part(path=corpus.path, weight=4.0), Part(path=second.path)))
    size = corpus.n_tokens("train")
    show_mixture(config, 10 * size)
    text = shown.getvalue()
    assert "80.0%" in text
    assert "20.0%" in text
    assert f"{8 * size:,}" in text
    assert "8.00" in text
    (warning,) = (line for line in text.splitlines() if line.startswith("warning"))
    assert str(corpus.path) in warning
    assert "8.0 times" in warning


def test_four_epochs_need_no_warning(corpus, shown):
    show_mixture(LoaderConfig(corpora=(Part(path=corpus.path),)), 4 * corpus.n_tokens("train"))
    assert "4.00" in shown.getvalue()
    assert "warning" not in shown.getvalue()


def test_a_weight_of_less_than_a_row_is_said(corpus, second, shown):
    """Of 1,000 rows, a weight of 1e-6 gives none."""
    parts = Part(path=corpus.path), Part(path=second.path, weight=1e-6)
    config = LoaderConfig(corpora=parts, length=16, batch_size=4)
    show_mixture(config, 1000 * config.length)
    (warning,) = (line for line in shown.getvalue().splitlines() if "weight 1e-06" in line)
    assert f"warning: weight 1e-06 of {second.path} amounts to 0.001 of the run's 1,000 rows" in warning
    loader = batches(replace(config, shuffle=False))
    only = batches(replace(config, corpora=config.corpora[:1], shuffle=False))
    assert all((next(loader)["tokens"] == next(only)["tokens"]).all() for _ in range(250))


def test_without_repeats_each_corpus_is_read_once(corpus, shown):
    show_mixture(LoaderConfig(corpora=(Part(path=corpus.path),), repeat=False), 10**9)
    assert "1.00" in shown.getvalue()
    assert "warning" not in shown.getvalue()


def test_what_is_missing_is_said_before_the_run(corpus, tmp_path):
    with pytest.raises(CorpusError, match="nowhere"):
        show_mixture(LoaderConfig(corpora=(Part(path=tmp_path / "nowhere"),)), 10)
    with pytest.raises(ConfigError, match="no split 'dev'"):
        show_mixture(LoaderConfig(corpora=(Part(path=corpus.path),), split="dev"), 10)
