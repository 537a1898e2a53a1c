import numpy as np
import pytest

from efftrain.data.splits import N_BUCKETS, SPLITS, SplitByGroup, assign_buckets, bucket
from efftrain.data.stages.spool import stable_hash
from efftrain.errors import ConfigError, CorpusError


def sizes_of(groups: dict[str, int]) -> tuple[np.ndarray, dict[str, int]]:
    sizes = np.zeros(N_BUCKETS, np.int64)
    places = {}
    for name, size in groups.items():
        places[name] = int(bucket(np.array([stable_hash(name, "split 0")], np.uint64))[0])
        sizes[places[name]] += size
    return sizes, places


def test_shares_are_met_in_bytes():
    rng = np.random.default_rng(0)
    sizes, _ = sizes_of({f"p{i}": int(rng.lognormal(8, 2)) for i in range(300)})
    split = assign_buckets(SplitByGroup(validation=0.05, test=0.1), sizes)
    shares = [sizes[split == i].sum() / sizes.sum() for i in range(3)]
    assert shares[1] == pytest.approx(0.05, abs=0.006)
    assert shares[2] == pytest.approx(0.1, abs=0.012)


def test_a_dominant_package_is_trained_on():
    sizes, places = sizes_of({"huge": 10**6, **{f"p{i}": 1000 for i in range(100)}})
    assert SPLITS[assign_buckets(SplitByGroup(), sizes)[places["huge"]]] == "train"


@pytest.mark.parametrize("n", [3, 4, 10])
def test_a_small_corpus_fills_every_split(n):
    sizes, _ = sizes_of({f"p{i}": 10 ** (i % 4) for i in range(n)})
    split = assign_buckets(SplitByGroup(), sizes)
    assert set(split[sizes > 0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("share", [0.4, 0.49])
def test_large_shares_leave_something_to_train_on(share):
    for n in range(3, 12):
        sizes, _ = sizes_of({f"p{i}": 100 for i in range(n)})
        split = assign_buckets(SplitByGroup(validation=share, test=share), sizes)
        assert set(split[sizes > 0].tolist()) == {0, 1, 2}


def test_another_seed_hashes_to_other_groups():
    assert stable_hash("numpy", "split 0") != stable_hash("numpy", "split 1")
    assert stable_hash("numpy", "split 0") == 0xE321CFFADBDED095  # a change would move documents between splits


def test_a_split_that_is_not_wanted_is_empty():
    sizes, _ = sizes_of({f"p{i}": 100 for i in range(50)})
    assert set(assign_buckets(SplitByGroup(test=0), sizes).tolist()) == {0, 1}


def test_too_few_groups_are_refused():
    sizes, _ = sizes_of({"a": 5, "b": 5})
    with pytest.raises(CorpusError, match="only 2 documents are left for 3 splits"):
        assign_buckets(SplitByGroup(), sizes)


@pytest.mark.parametrize("shares", [(-0.1, 0.1), (0.5, 0.5), (0.9, 0.2)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ConfigError, match=r"split\.validation"):
        SplitByGroup(validation=shares[0], test=shares[1])
