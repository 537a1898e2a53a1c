"""What becomes of a run's zeros in the commands that are given it afterwards."""

import pytest
from tiny_models import PLAIN, build, config
from tiny_runs import LENGTH, VOCABULARY, write_corpus, write_run

from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.structured_prune import StructuredPrune
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.pruning.one_shot import prune
from efftrain.compress.run import compress
from efftrain.errors import ConfigError
from efftrain.ops.masks import SemiStructured
from efftrain.train.config import Training

MODEL = config(vocab_size=VOCABULARY, pattern=(PLAIN,), n_repeats=2, max_length=32)
TRAINING = Training(steps=40, batch_size=8, length=LENGTH)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").mkdir()
    model, _ = prune(LayerwiseModel.of(build(MODEL)), SemiStructured(n=2, m=4), method="magnitude")
    return write_run(folder / "2of4", model, write_corpus(folder / "text"), TRAINING)


@pytest.mark.parametrize("recovery", [None, RecoveryTraining(tokens=4096)])
def test_a_structured_cut_of_a_sparse_run_is_refused_with_the_order_to_use(sparse, recovery):
    def files() -> list:
        return sorted(sparse.parent.rglob("*"))

    before = files()
    with pytest.raises(ConfigError, match=r"was pruned \(50% of .*; make the dense run smaller first, and prune"):
        compress(sparse, StructuredPrune(ratio=0.3, recovery=recovery, rows=2))
    assert files() == before
