"""The format of a teacher's cache, and the loader that reads it beside the rows."""

import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from efftrain import data
from efftrain.data.loading.loader import Batch, _identity
from efftrain.data.loading.mixture import mixture_table
from efftrain.data.storage import store
from efftrain.data.storage.packing import row
from efftrain.data.storage.teacher_cache import TeacherCache, describe, write_shard
from efftrain.data.storage.teacher_records import CachePlan, decode, encode_sampled, encode_top_k, row_digest
from efftrain.errors import ConfigError, CorpusError, RunError

LENGTH, BATCH, ROWS, K = 32, 8, 21, 3
LOGS = np.log([0.5, 0.25, 0.125])  # exact in float16 to 1e-4


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("efftrain.data.storage.teacher_records.SHARD_ROWS", 8)


def plan_for(corpus: data.Corpus, /, **changes) -> CachePlan:
    fields = {
        "kind": "top_k",
        "n": K,
        "seed": None,
        "vocab_size": corpus.vocab_size,
        "teacher": "f" * 32,
        "corpus": corpus.token_fingerprint,
        "tokenizer": corpus.manifest["files"]["tokenizer.json"]["blake2b"],
        "split": "train",
        "length": LENGTH,
        "rows": ROWS,
    }
    return CachePlan(**(fields | changes))


def guesses(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """What the teacher of these tests predicts behind a token: (...) -> (..., K)."""
    return (tokens[..., None].astype(np.int64) * 7 + np.arange(K)) % vocab_size


def write(folder: Path, corpus: data.Corpus, plan: CachePlan, rows: data.PackedRows | None = None) -> Path:
    rows = rows or data.PackedRows(corpus, plan.split, plan.length)
    folder.mkdir()

    def record(number: int) -> bytes:
        ids = guesses(rows[number]["tokens"], plan.vocab_size)
        if plan.kind == "sampled":  # the first of them twice
            return encode_sampled(plan, rows[number], ids[:, [2, 0, 1, 0]][:, : plan.n])
        return encode_top_k(plan, rows[number], ids[:, : plan.n], np.tile(LOGS[: plan.n], (plan.length, 1)))

    for name, numbers in plan.shards():
        write_shard(folder / name, (record(number) for number in numbers))
    content = describe(plan, folder, n_tokens=plan.rows * plan.length)
    store.write_manifest(folder, content | {"made_by": {"run": "large", "step": 12}})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efftrain.data.storage.teacher_records.SHARD_ROWS", 8)
        return write(tmp_path_factory.mktemp("caches") / "top3", corpus, plan_for(corpus))


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def config(corpus) -> data.LoaderConfig:
    return data.LoaderConfig(corpora=(data.Part(path=corpus.path),), length=LENGTH, batch_size=BATCH, seed=3)


def with_part(config: data.LoaderConfig, **changes) -> data.LoaderConfig:
    return replace(config, corpora=(replace(config.corpora[0], **changes),))


def global_batches(config, n, process_count=1) -> list[Batch]:
    loaders = [data.batches(config, p, process_count) for p in range(process_count)]
    rounds = [[next(loader) for loader in loaders] for _ in range(n)]
    return [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in rounds]


def ragged_row(length: int, n_real: int) -> dict[str, np.ndarray]:
    return row(np.arange(1, n_real + 1, dtype=np.int32), length, end_of_text_id=0)


def test_a_record_of_the_largest_has_the_bytes_of_its_description(corpus):
    plan, text = plan_for(corpus, length=4), ragged_row(4, 3)
    ids = np.array([[5, 1, 299], [7, 8, 9], [2, 0, 3], [4, 4, 4]])
    record = encode_top_k(plan, text, ids, np.tile(LOGS, (4, 1)))
    assert record[:16] == row_digest(text)
    assert len(record) == 16 + 4 * K * (2 + 2)
    stored = np.frombuffer(record[16 : 16 + 24], "<u2").reshape(4, K)
    np.testing.assert_array_equal(stored, [*ids[:3], [0, 0, 0]])
    logs = np.frombuffer(record[40:], "<f2").reshape(4, K)
    np.testing.assert_array_equal(logs[:3], np.tile(LOGS.astype(np.float16), (3, 1)))
    made_from, found = decode(plan, record, K + 1)
    assert made_from == row_digest(text)
    np.testing.assert_array_equal(found["teacher_ids"], [[*line, 0] for line in [*ids[:3].tolist(), [0, 0, 0]]])
    expected = [[0.5, 0.25, 0.125, 0]] * 3 + [[0, 0, 0, 0]]  # no probability in padding
    np.testing.assert_allclose(found["teacher_probs"], expected, rtol=1e-3)
    assert found["teacher_ids"].dtype == np.int32
    assert found["teacher_probs"].dtype == np.float32


def test_a_large_vocabulary_takes_two_more_bytes(corpus):
    text, ids = ragged_row(4, 4), np.full((4, K), 65_536)
    sizes = {}
    for vocab_size in (65_536, 65_537):
        plan = plan_for(corpus, length=4, vocab_size=vocab_size)
        record = encode_top_k(plan, text, ids - 1 if vocab_size == 65_536 else ids, np.tile(LOGS, (4, 1)))
        sizes[vocab_size] = len(record)
        assert decode(plan, record, K)[1]["teacher_ids"].max() == vocab_size - 1
    assert sizes == {65_536: 16 + 4 * K * 4, 65_537: 16 + 4 * K * 6}


def test_probabilities_that_were_rounded_up_do_not_sum_to_more_than_one(corpus):
    rng = np.random.default_rng(0)
    logs = np.log(rng.dirichlet(np.ones(K), 64))  # all of the mass is in what is kept
    plan, text = plan_for(corpus, length=64), ragged_row(64, 64)
    _, found = decode(plan, encode_top_k(plan, text, rng.integers(0, 300, (64, K)), logs), K)
    sums = found["teacher_probs"].sum(axis=1)
    assert sums.max() <= 1 + 1e-6
    np.testing.assert_allclose(sums, 1, atol=2e-3)
    np.testing.assert_allclose(found["teacher_probs"], np.exp(logs), rtol=4e-3)


def test_a_record_of_samples_is_which_and_how_often(corpus):
    plan, text = plan_for(corpus, kind="sampled", n=5, seed=0, length=4), ragged_row(4, 3)
    draws = np.array([[9, 2, 9, 9, 2], [1, 1, 1, 1, 1], [8, 7, 6, 5, 4], [3, 3, 3, 3, 3]])
    record = encode_sampled(plan, text, draws)
    n_entries, ids, counts = [2, 1, 5, 0], [2, 9, 1, 4, 5, 6, 7, 8], [2, 3, 5, 1, 1, 1, 1, 1]
    by_hand = np.uint8(n_entries).tobytes() + np.array(ids, "<u2").tobytes() + np.uint8(counts).tobytes()
    assert record == row_digest(text) + by_hand
    _, found = decode(plan, record, 6)
    for t in range(4):
        drawn = draws[t] if t < 3 else []
        expected = {int(token): np.mean(drawn == token) for token in np.unique(drawn)}
        kept = {int(i): p for i, p in zip(found["teacher_ids"][t], found["teacher_probs"][t], strict=True) if p}
        assert kept == pytest.approx(expected)
    assert not found["teacher_ids"][found["teacher_probs"] == 0].any()


@pytest.mark.parametrize("n", [1, 255])
def test_the_most_and_the_fewest_samples_fit(corpus, n):
    plan, text = plan_for(corpus, kind="sampled", n=n, seed=0, length=4), ragged_row(4, 4)
    one = np.full((4, n), 17)
    _, found = decode(plan, encode_sampled(plan, text, one), 1)
    np.testing.assert_array_equal(found["teacher_probs"], np.ones((4, 1)))
    many = np.tile(np.arange(n), (4, 1))
    _, found = decode(plan, encode_sampled(plan, text, many), n)
    np.testing.assert_array_equal(found["teacher_ids"], many)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "--top-k is 0; give a number from 1 to 300"),
        ({"n": 301}, "--top-k is 301"),
        ({"kind": "sampled", "n": 256}, "--samples is 256; give a number from 1 to 255"),
    ],
)
def test_impossible_numbers_are_named(corpus, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan_for(corpus, vocab_size=300, **changes)


def test_the_digest_of_a_row_is_of_what_the_model_reads():
    text = ragged_row(6, 4)
    assert row_digest(text) == row_digest({name: values.astype(np.int64) for name, values in text.items()})
    others = [ragged_row(6, 5), ragged_row(7, 4), text | {"tokens": text["tokens"] + (np.arange(6) == 2)}]
    # <|endoftext|> at the end is not padding, though both are zero.
    others += [row(np.array([1, 2, 3, 4, 0], np.int32), 6, end_of_text_id=0)]
    assert len({row_digest(text), *map(row_digest, others)}) == 5


def test_shards_grow_before_there_are_too_many(corpus):
    plan = plan_for(corpus, rows=10_000)
    shards = plan.shards()
    assert len(shards) <= 256
    assert [number for _, numbers in shards for number in numbers] == list(range(10_000))


def test_the_manifest_says_what_it_takes(made, corpus):
    manifest = json.loads((made / "manifest.json").read_text())
    n_bytes = sum(path.stat().st_size for path in made.glob("*.array_record"))
    assert len(list(made.glob("*.array_record"))) == 3
    assert (manifest["width"], manifest["tokens"], manifest["bytes"]) == (K, ROWS * LENGTH, n_bytes)
    assert manifest["bytes_per_token"] == round(n_bytes / (ROWS * LENGTH), 2)
    assert manifest["plan"] == asdict(plan_for(corpus))


def test_samples_are_as_wide_as_any_position_needs(corpus, tmp_path):
    plan = plan_for(corpus, kind="sampled", n=4, seed=0)
    cache = TeacherCache.open(write(tmp_path / "drawn", corpus, plan))
    assert cache.width == 3  # of four draws two are the same
    text = data.PackedRows(corpus, "train", LENGTH)[5]
    found = cache.read(5, text)
    real = text["segments"] > 0
    expected = np.zeros((LENGTH, corpus.vocab_size))
    np.add.at(expected, (np.arange(LENGTH)[:, None], guesses(text["tokens"], corpus.vocab_size)), [0.5, 0.25, 0.25])
    dense = np.zeros_like(expected)
    np.add.at(dense, (np.arange(LENGTH)[:, None], found["teacher_ids"]), found["teacher_probs"])
    np.testing.assert_array_equal(dense, expected * real[:, None])


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_batches_have_what_the_teacher_says_of_their_own_tokens(config, made, corpus, process_count):
    for batch in global_batches(with_part(config, teacher=made), 8, process_count):  # three epochs
        assert batch["teacher_ids"].shape == batch["teacher_probs"].shape == (BATCH, LENGTH, K)
        np.testing.assert_array_equal(batch["teacher_ids"], guesses(batch["tokens"], corpus.vocab_size))
        np.testing.assert_allclose(batch["teacher_probs"], np.tile(np.exp(LOGS), (BATCH, LENGTH, 1)), rtol=1e-3)


def test_the_rows_of_a_cache_come_in_the_order_that_they_have_without_it(config, made):
    taught, plain = with_part(config, teacher=made), with_part(config, rows=ROWS)
    both = [global_batches(c, 9) for c in (taught, plain)]
    for one, other in zip(*both, strict=True):
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])
    assert set(both[0][0]) - set(both[1][0]) == {"teacher_ids", "teacher_probs"}
    fewer = [global_batches(with_part(config, **c), 5) for c in ({"teacher": made, "rows": 9}, {"rows": 9})]
    np.testing.assert_array_equal(fewer[0][4]["tokens"], fewer[1][4]["tokens"])


def test_only_the_first_rows_are_read_each_once_an_epoch(config, corpus):
    packed = data.PackedRows(corpus, "train", LENGTH)
    assert len(packed) > ROWS
    loader = data.batches(replace(with_part(config, rows=ROWS), batch_size=1))
    for _ in range(2):
        read = sorted(batch["tokens"][0].tolist() for batch in itertools.islice(loader, ROWS))
        assert read == sorted(packed[number]["tokens"].tolist() for number in range(ROWS))


def test_rows_of_padding_have_an_empty_teacher(config, made):
    once = replace(with_part(config, teacher=made), shuffle=False, repeat=False)
    batches = list(data.batches(once))
    assert len(batches) == 3
    assert batches[-1]["mask"].any(axis=1).sum() == ROWS - 2 * BATCH
    assert batches[-1]["teacher_probs"].shape == (BATCH, LENGTH, K)
    assert batches[-1]["teacher_probs"][:5].all()
    assert not batches[-1]["teacher_probs"][5:].any()
    assert not batches[-1]["teacher_ids"][5:].any()


def test_a_mixture_is_as_wide_as_its_widest_part(config, corpus, made, tmp_path):
    narrow = write(tmp_path / "top1", corpus, plan_for(corpus, n=1))
    part = config.corpora[0]
    both = replace(config, corpora=(replace(part, teacher=made), replace(part, teacher=narrow)))
    (batch,) = global_batches(replace(both, batch_size=16), 1)
    n_entries = (batch["teacher_probs"] > 0).sum(axis=2)
    assert set(n_entries.ravel().tolist()) == {1, K}
    assert batch["teacher_ids"].shape == (16, LENGTH, K)


def test_identities_of_before_are_as_they_were():
    """Computed before parts had rows and a teacher: saved positions of old runs are still accepted."""
    one = data.LoaderConfig(corpora=(data.Part(path=Path("corpora/python")),))
    first, second = (SimpleNamespace(token_fingerprint=digit * 32) for digit in "01")
    assert _identity(one, [first], []) == "29cf349af95fcaedb903d3ba36504ddb"
    two = data.LoaderConfig(
        corpora=(data.Part(path=Path("a"), weight=3.0), data.Part(path=Path("b"))),
        length=32,
        batch_size=8,
        split="validation",
        seed=3,
        shuffle=False,
        repeat=False,
        threads=1,
    )
    assert _identity(two, [first, second], []) == "47b71506a50b05598876eb467ce1de15"


def test_a_position_is_that_of_the_same_rows_and_the_same_teacher(config, corpus, made, copy, tmp_path):
    taught = with_part(config, teacher=made)
    loader = data.batches(taught)
    for _ in range(4):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    moved = data.batches(with_part(config, teacher=copy))  # it may lie elsewhere
    moved.set_state(state)
    np.testing.assert_array_equal(next(moved)["tokens"], next(loader)["tokens"])
    other = write(tmp_path / "top2", corpus, plan_for(corpus, n=2))
    for changes in ({}, {"rows": ROWS}, {"rows": ROWS - 1}, {"teacher": made, "rows": 9}, {"teacher": other}):
        with pytest.raises(RunError, match="another corpus"):
            data.batches(with_part(config, **changes)).set_state(state)


def test_the_budget_is_shown_for_the_rows_that_are_read(config, made):
    for changes in ({"rows": ROWS}, {"teacher": made}):
        table, warnings = mixture_table(with_part(config, **changes), 5 * ROWS * LENGTH)
        assert list(table.columns[3].cells) == [f"{ROWS * LENGTH:,}"]
        assert "repeated 5.0 times" in warnings[0]


def one_sentence(message: str) -> bool:
    return "\n" not in message and not message.endswith(".")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"corpus": "0" * 32}, CorpusError, "was made from another corpus than .*; make one with: efftrain teacher"),
        ({"split": "validation", "rows": 5}, ConfigError, "made for split 'validation', but loader.split is 'train'"),
        ({"length": 16}, ConfigError, "made for rows of 16 tokens, but rows have 32 here; use a length of 16, or"),
    ],
)
def test_a_cache_of_other_rows_is_refused(config, corpus, tmp_path, changes, error, message):
    folder = write(tmp_path / "other", corpus, plan_for(corpus, **changes))
    with pytest.raises(error, match=message) as raised:
        data.batches(with_part(config, teacher=folder))
    assert one_sentence(str(raised.value))


def test_a_row_of_other_data_is_refused_by_its_number(config, corpus, tmp_path):
    """As of a manifest that says the right corpus, and records that do not."""
    rows = data.PackedRows(corpus, "train", LENGTH)
    swapped = [rows[number if number != 13 else 14] for number in range(ROWS)]
    folder = write(tmp_path / "swapped", corpus, plan_for(corpus), swapped)
    cache = TeacherCache.open(folder)
    cache.read(12, rows[12])
    with pytest.raises(CorpusError, match=rf"row 13 of {folder} .* made from other data; .*efftrain teacher") as raised:
        cache.read(13, rows[13])
    assert one_sentence(str(raised.value))
    with pytest.raises(CorpusError, match="row 13 of"):
        list(data.batches(replace(with_part(config, teacher=folder), repeat=False)))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_shard_is_refused_by_name(config, copy, damage):
    path = copy / "train-00001.array_record"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[:-1] if damage == "truncate" else content)
    if damage == "delete":
        path.unlink()
    with pytest.raises(CorpusError, match=r"train-00001.array_record .*efftrain teacher RUN --out") as raised:
        data.batches(with_part(config, teacher=copy))
    assert one_sentence(str(raised.value))


def test_a_record_of_another_size_is_refused(copy, corpus):
    rows = data.PackedRows(corpus, "train", LENGTH)
    write_shard(copy / "train-00000.array_record", [row_digest(rows[number]) + b"12345" for number in range(8)])
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"] = {}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match=r"row 3 of .* is damaged"):
        TeacherCache.open(copy).read(3, rows[3])


def test_what_is_no_cache_is_refused(copy, corpus, tmp_path):
    def refused(path: Path) -> str:
        with pytest.raises(CorpusError) as raised:
            TeacherCache.open(path)
        assert one_sentence(str(raised.value))
        return str(raised.value)

    assert "there is no teacher cache" in refused(tmp_path / "nowhere")
    (tmp_path / "nowhere.incomplete").mkdir()
    assert "a build was interrupted" in refused(tmp_path / "nowhere")
    assert "is not a teacher cache" in refused(tmp_path)
    assert "has format 1, but this version reads teacher caches" in refused(corpus.path)
    with pytest.raises(CorpusError, match="has corpus format teacher-cache-1"):
        data.open(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for value in ("[]", "{", json.dumps(manifest | {"plan": {}})):
        (copy / "manifest.json").write_text(value)
        assert "is damaged" in refused(copy)


def test_another_teacher_is_named(made):
    cache = TeacherCache.open(made)
    cache.check_teacher("f" * 32)
    with pytest.raises(ConfigError, match=r"made by another teacher \(run large, step 12\)"):
        cache.check_teacher("e" * 32)


def test_parts_that_do_not_fit_together_are_refused(config, corpus, made, tmp_path):
    part = config.corpora[0]
    taught = replace(part, teacher=made)
    with pytest.raises(ConfigError, match="some parts have a teacher cache and others have none"):
        data.batches(replace(config, corpora=(part, taught)))
    drawn = write(tmp_path / "drawn", corpus, plan_for(corpus, kind="sampled", n=4, seed=0))
    other = write(tmp_path / "other", corpus, plan_for(corpus, teacher="e" * 32))
    for folder in (drawn, other):
        with pytest.raises(ConfigError, match="different teachers or are of different kinds"):
            data.batches(replace(config, corpora=(taught, replace(part, teacher=folder))))


def test_more_rows_than_there_are_are_refused(config, made):
    with pytest.raises(ConfigError, match=r"rows of .* is 0; give at least 1"):
        with_part(config, rows=0)
    with pytest.raises(ConfigError, match=r"rows is 1000000, but split 'train' of .* rows of 32 tokens"):
        data.batches(with_part(config, rows=10**6))
    with pytest.raises(ConfigError, match=rf"rows is {ROWS + 1}, but .* has {ROWS} rows"):
        data.batches(with_part(config, teacher=made, rows=ROWS + 1))
