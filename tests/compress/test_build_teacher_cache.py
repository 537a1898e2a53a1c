"""A teacher's cache as it is built: what is kept, that it is kept once, and what is refused."""

import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from flax import nnx
from scipy.special import log_softmax
from tiny_models import PLAIN, build, config
from tiny_runs import LENGTH, OWN_BLOCK, VOCABULARY, with_own_block, write_corpus, write_run

import efftrain
from efftrain import code_identity, data
from efftrain.compress.distillation import build_teacher_cache as teacher_cache
from efftrain.compress.distillation.build_teacher_cache import CacheOptions, build_cache
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.quantization.convert import convert
from efftrain.data.storage.teacher_cache import TeacherCache
from efftrain.errors import ConfigError, CorpusError, RunError
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths, causally_routed
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.number_formats import Integer
from efftrain.train.inputs import model_digest

ROWS, K = 21, 8
MODEL = config(vocab_size=VOCABULARY + 8, pattern=(PLAIN,), n_repeats=1, max_length=32)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("efftrain.data.storage.teacher_records.SHARD_ROWS", 8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> data.Corpus:
    return write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "large", sharp(MODEL), corpus)


def sharp(model_config, seed: int = 0) -> Decoder:
    """A teacher with opinions: a norm that makes its logits differ by several nats."""
    model = build(model_config, seed)
    model.norm.scale[...] *= 10 if model_config.tied_embedding else 2
    return model


def log_probs(model: Decoder, batch: dict[str, np.ndarray]) -> np.ndarray:
    """(batch, length, tokenizer's vocabulary) float64, of the whole model on whole rows."""
    logits = logits_of(*nnx.split(model), batch["tokens"], batch["segments"], batch["positions"])
    return log_softmax(np.asarray(logits, np.float64)[..., :VOCABULARY], axis=-1)


@partial(jax.jit, static_argnums=0)
def logits_of(graph, state, tokens, segments, positions):
    return nnx.merge(graph, state)(tokens, segments_bt=segments, positions_bt=positions)


def rows_of(corpus: data.Corpus, numbers, length: int = LENGTH, split: str = "train") -> dict[str, np.ndarray]:
    packed = data.PackedRows(corpus, split, length)
    rows = [packed[number] for number in numbers]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def records(folder: Path) -> list[bytes]:
    return [record for path in sorted(folder.glob("*.array_record")) for record in ArrayRecordDataSource(str(path))]


def dense(batch: dict[str, np.ndarray]) -> np.ndarray:
    """(batch, length, vocabulary) of what a batch says of the teacher."""
    probs = np.zeros((*batch["teacher_ids"].shape[:2], VOCABULARY))
    b, t = np.ogrid[: len(probs), : probs.shape[1]]
    np.add.at(probs, (b[..., None], t[..., None], batch["teacher_ids"]), batch["teacher_probs"])
    return probs


def quantized() -> Decoder:
    rule = QuantizationRule(layers=".*", weights=Integer(bits=8))
    return convert(LayerwiseModel.of(sharp(MODEL)), Quantization(rules=(rule,)))[0]


TEACHERS = {
    "float32": lambda: sharp(MODEL),
    "bfloat16, tied": lambda: sharp(MODEL.replace(dtype="bfloat16", tied_embedding=True)),
    "stored in 8 bits": quantized,
    "mixture of depths": lambda: sharp(MODEL.replace(pattern=(replace(PLAIN, depth=MixtureOfDepths(capacity=0.5)),))),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_batches_have_the_largest_probabilities_of_their_own_tokens(corpus, tmp_path, name):
    """After shuffling, on one process and two, against the whole model on the batch as it comes."""
    run = write_run(tmp_path / "run", TEACHERS[name](), corpus)
    cache = build_cache(run, CacheOptions(top_k=K, rows=ROWS, batch_size=4))
    assert cache == tmp_path / f"run-top{K}-rows{ROWS}"
    model = causally_routed(efftrain.load(run))
    tolerance = 0.05 if name.startswith("bfloat16") else 0.01  # that of float16 logarithms, and of another batch
    part = data.Part(path=corpus.path, teacher=cache)
    loader = data.LoaderConfig(corpora=(part,), length=LENGTH, batch_size=8, seed=1)
    for process_count in (1, 2):
        loaders = [data.batches(loader, p, process_count) for p in range(process_count)]
        for _ in range(4):
            local = [next(one) for one in loaders]
            batch = {key: np.concatenate([one[key] for one in local]) for key in local[0]}
            truth, real = log_probs(model, batch), batch["segments"] > 0
            largest = np.exp(-np.sort(-truth, axis=-1)[..., :K])
            assert largest[real].max() > 0.3
            found = batch["teacher_probs"]
            np.testing.assert_allclose(found[real], largest[real], rtol=tolerance)
            at_ids = np.exp(np.take_along_axis(truth, batch["teacher_ids"].astype(np.int64), axis=-1))
            np.testing.assert_allclose(found[real], at_ids[real], rtol=tolerance)
            np.testing.assert_allclose(1 - found.sum(-1)[real], 1 - largest.sum(-1)[real], atol=tolerance / 5)
            assert all(len(set(ids)) == K for ids in batch["teacher_ids"].reshape(-1, K))
            assert batch["teacher_ids"].max() < VOCABULARY


def test_padding_at_the_end_of_the_split_has_no_probabilities(corpus, run, tmp_path):
    cache = TeacherCache.open(
        build_cache(run, CacheOptions(top_k=K, split="validation", batch_size=4), out=tmp_path / "all")
    )
    last = data.PackedRows(corpus, "validation", LENGTH)[len(cache) - 1]
    real = last["segments"] > 0
    assert not real.all(), "another corpus is needed: its last row is full"
    found = cache.read(len(cache) - 1, last)
    assert found["teacher_probs"][real].all()
    assert not found["teacher_probs"][~real].any()
    n_tokens = corpus.n_tokens("validation")
    assert cache.manifest["tokens"] == n_tokens
    assert cache.manifest["bytes_per_token"] == round(cache.manifest["bytes"] / n_tokens, 2)


def test_a_record_takes_four_bytes_a_probability(run, tmp_path):
    folder = build_cache(run, CacheOptions(top_k=K, rows=ROWS), out=tmp_path / "cache")
    assert [len(record) for record in records(folder)] == [16 + LENGTH * K * (2 + 2)] * ROWS


def test_rows_may_be_as_long_as_the_model_allows(run, tmp_path):
    folder = build_cache(run, CacheOptions(top_k=K, rows=2, length=MODEL.max_length), out=tmp_path / "cache")
    assert len(TeacherCache.open(folder)) == 2


def test_logits_are_made_in_chunks_of_tokens(corpus, run, monkeypatch):
    """A chunk takes every n-th token; what comes out is in the order of the row."""
    monkeypatch.setattr(
        "efftrain.ops.fused_linear_loss.CHUNK_ELEMENTS", 2 * MODEL.vocab_size * 4
    )  # 4 positions of 2 rows
    batch, model = rows_of(corpus, range(2)), efftrain.load(run)
    seen, (graph, state) = [], nnx.split(model)
    read = {name: batch[name] for name in teacher_cache.READ}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "logits", lambda self, x, logits=Decoder.logits: seen.append(x.shape) or logits(self, x))
        ids, logs = teacher_cache.largest(graph, state, read, vocab_size=VOCABULARY, k=K + 1)
        numbers, seed = np.arange(2, dtype=np.uint32), np.uint32(0)
        drawn = teacher_cache.sample_tokens(graph, state, read, numbers, seed, vocab_size=VOCABULARY, n=400)
    assert {shape[:2] for shape in seen} == {(2, 4)}
    truth = log_probs(model, batch)
    np.testing.assert_allclose(logs, -np.sort(-truth, axis=-1)[..., : K + 1], rtol=2e-3, atol=1e-4)
    top = np.argmax(truth, axis=-1)
    assert (np.asarray(ids)[..., 0] == top).mean() > 0.95
    shares = (np.asarray(drawn) == top[..., None]).mean(axis=-1)
    np.testing.assert_allclose(shares, np.exp(truth.max(axis=-1)), atol=5 * 0.5 / 400**0.5)


def test_draws_are_independent_and_of_the_teachers_distribution(corpus, run):
    batch, model = rows_of(corpus, range(2)), efftrain.load(run)
    graph, state = nnx.split(model)
    read, numbers = {name: batch[name] for name in teacher_cache.READ}, np.arange(2, dtype=np.uint32)
    n_seeds, n = 20, 250
    draws = [
        np.asarray(
            teacher_cache.sample_tokens(graph, state, read, numbers, np.uint32(seed), vocab_size=VOCABULARY, n=n)
        )
        for seed in range(n_seeds)
    ]
    drawn = np.concatenate(draws, axis=-1).astype(np.int64)
    counts = np.zeros((2, LENGTH, VOCABULARY))
    b, t = np.ogrid[:2, :LENGTH]
    np.add.at(counts, (b[..., None], t[..., None], drawn), 1)
    probs, total = np.exp(log_probs(model, batch)), n_seeds * n
    assert np.all(np.abs(counts / total - probs) < 6 * np.sqrt(probs / total) + 8 / total)
    expected = total * probs
    often = expected > 5
    ratio = ((counts - expected)[often] ** 2 / expected[often]).mean()
    assert 0.9 < ratio < 1.1  # chi squared: as much scatter as independent draws have, no more and no less
    assert len({one.tobytes() for one in draws}) == n_seeds
    assert np.any(draws[0][0] != draws[0][1])


def test_weights_of_samples_are_unbiased(corpus, run, tmp_path):
    """The mean over caches of several seeds comes close to the distribution."""
    found, packed = [], data.PackedRows(corpus, "train", LENGTH)
    for seed in range(10):
        options = CacheOptions(top_k=None, samples=50, rows=2, seed=seed, batch_size=2)
        cache = TeacherCache.open(build_cache(run, options, out=tmp_path / str(seed)))
        assert cache.width <= 50
        taught = [cache.read(number, packed[number]) for number in range(2)]
        batch = {name: np.stack([one[name] for one in taught]) for name in taught[0]}
        assert cache.width == (batch["teacher_probs"] > 0).sum(axis=-1).max()
        np.testing.assert_allclose(batch["teacher_probs"].sum(axis=-1), 1, rtol=1e-6)
        found.append(dense(batch))
    probs, total = np.exp(log_probs(efftrain.load(run), rows_of(corpus, range(2)))), 10 * 50
    assert np.all(np.abs(np.mean(found, axis=0) - probs) < 6 * np.sqrt(probs / total) + 8 / total)


def test_samples_are_those_of_the_seed_and_the_row_whatever_the_batch(run, tmp_path):
    def made(name: str, **changes) -> list[bytes]:
        options = CacheOptions(**{"top_k": None, "samples": 20, "rows": ROWS, "batch_size": 4, **changes})
        return records(build_cache(run, options, out=tmp_path / name))

    first = made("first")
    assert made("again") == first
    assert made("larger", batch_size=5) == first
    assert made("fewer", rows=9) == first[:9]
    assert all(a != b for a, b in zip(made("other", seed=1), first, strict=True))


KILLED = """
import os, signal, sys
from efftrain.cli.main import main
from efftrain.compress.distillation import build_teacher_cache as teacher_cache
import efftrain.data.storage.teacher_records as format
format.SHARD_ROWS = 8
encode, calls = teacher_cache.encode_top_k, []
def encode_some(*arguments):
    calls.append(1)
    if len(calls) == 13:  # within the second shard
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
teacher_cache.encode_top_k = encode_some
main(sys.argv[1:])
"""


def test_a_killed_build_goes_on_with_the_shards_that_are_whole(run, tmp_path, capfd):
    out = tmp_path / "cache"
    command = ["teacher", str(run), "--top-k", str(K), "--rows", str(ROWS), "--batch-size", "4", "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    with pytest.raises(CorpusError, match="a build was interrupted"):
        TeacherCache.open(out)
    unfinished = out.with_name("cache.incomplete")
    assert [path.name for path in unfinished.glob("*.array_record")] == ["train-00000.array_record"]
    whole = unfinished / "train-00000.array_record"
    before = whole.stat().st_mtime_ns, whole.stat().st_ino
    options = CacheOptions(top_k=K, rows=ROWS, batch_size=4)
    build_cache(run, options, out=out)
    assert "continuing it" in capfd.readouterr().err
    assert not unfinished.exists()
    kept = out / "train-00000.array_record"
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before
    straight = build_cache(run, options, out=tmp_path / "straight")
    assert records(out) == records(straight)
    assert len(records(out)) == ROWS
    assert TeacherCache.open(out).fingerprint == TeacherCache.open(straight).fingerprint
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in straight.iterdir())


def test_an_unfinished_build_of_another_plan_starts_again(run, tmp_path, monkeypatch, capfd):
    """Also: what is left by an error and continued with another size of batch has the same records."""
    out, encode, calls = tmp_path / "cache", teacher_cache.encode_sampled, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 13:
            raise OSError("gone")
        return encode(*arguments)

    options = CacheOptions(top_k=None, samples=9, rows=ROWS, batch_size=4)
    straight = records(build_cache(run, options, out=tmp_path / "straight"))
    for then, message in (
        (replace(options, batch_size=7), "continuing it"),
        (replace(options, seed=5), "starting again"),
    ):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(teacher_cache, "encode_sampled", fail)
            with pytest.raises(OSError, match="gone"):
                build_cache(run, options, out=out / message)
        capfd.readouterr()
        found = records(build_cache(run, then, out=out / message))
        assert message in capfd.readouterr().err
        assert (found == straight) == (then.seed == 0)


def test_a_cache_that_is_there_is_not_built_again_and_never_replaced(run, corpus, tmp_path, monkeypatch, capfd):
    options = CacheOptions(top_k=K, rows=ROWS)
    out = build_cache(run, options, out=tmp_path / "cache")
    assert "bytes per token" in capfd.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    monkeypatch.setattr(teacher_cache, "largest", None)
    assert build_cache(run, replace(options, batch_size=3), out=out) == out
    assert "already exists" in capfd.readouterr().err
    other = write_run(tmp_path / "other", sharp(MODEL, seed=1), corpus)
    for teacher, wanted, field in (
        (run, replace(options, top_k=K + 1), "n: 8 -> 9"),
        (run, replace(options, rows=ROWS - 1), "rows: 21 -> 20"),
        (other, options, "teacher: "),
    ):
        with pytest.raises(CorpusError, match=f"made with other options or inputs \\({field}.*choose another --out"):
            build_cache(teacher, wanted, out=out)
    assert {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]} == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "words.tex").write_text("words")
    with pytest.raises(CorpusError, match="is not a teacher cache; choose another --out"):
        build_cache(run, options, out=tmp_path / "thesis")


@pytest.fixture
def fork(corpus, tmp_path) -> Path:
    """A run whose feed-forward part its own recipe defines."""
    return with_own_block(write_run(tmp_path / "fork", sharp(MODEL), corpus))


def test_a_cache_of_another_block_is_not_taken_for_this_ones(fork, tmp_path):
    options, out = CacheOptions(top_k=K, rows=ROWS), tmp_path / "cache"
    build_cache(fork, options, out=out)
    assert build_cache(fork, options, out=out) == out
    before = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    (fork / "recipe.py").write_text(OWN_BLOCK.replace("1.0", "2.0"))
    with pytest.raises(CorpusError, match=r"was made with other .*choose another --out, or delete it"):
        build_cache(fork, options, out=out)
    assert {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]} == before


def test_a_cache_of_other_code_is_refused_and_still_read(fork, tmp_path, monkeypatch):
    """The package itself was edited: what is there is not what it would make, and as good to learn from as it was."""
    options, out = CacheOptions(top_k=K, rows=ROWS), tmp_path / "cache"
    build_cache(fork, options, out=out)
    monkeypatch.setattr(code_identity, "package_identity", lambda rooms: "another version")
    with pytest.raises(CorpusError, match=r"made with other code \(changed since: efftrain\); choose another --out"):
        build_cache(fork, options, out=out)
    TeacherCache.open(out).check_teacher(model_digest(efftrain.load(fork)))


def test_an_unfinished_cache_of_other_code_starts_again(fork, tmp_path, monkeypatch, capfd):
    options, out = CacheOptions(top_k=K, rows=ROWS, batch_size=4), tmp_path / "cache"
    encode, calls = teacher_cache.encode_top_k, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 13:  # within the second shard
            raise OSError("gone")
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "encode_top_k", fail)
        with pytest.raises(OSError, match="gone"):
            build_cache(fork, options, out=out)
    monkeypatch.setattr(code_identity, "package_identity", lambda rooms: "another version")
    build_cache(fork, options, out=out)
    assert "starting again" in capfd.readouterr().err


def test_another_teacher_than_that_of_the_cache_is_refused(run, tmp_path):
    cache = TeacherCache.open(build_cache(run, CacheOptions(top_k=2, rows=3, batch_size=3), out=tmp_path / "cache"))
    cache.check_teacher(model_digest(efftrain.load(run)))
    with pytest.raises(ConfigError, match=r"another teacher \(run large, step 40\)"):
        cache.check_teacher(model_digest(sharp(MODEL, seed=1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": None}, "--top-k is None and --samples is None; set exactly one of them"),
        ({"samples": 5}, "--top-k is 64 and --samples is 5; set exactly one of them"),
        ({"top_k": 0}, "--top-k is 0; give at least 1"),
        ({"rows": 0}, "--rows is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"rows": 10**6}, r"--rows is 1000000 and split 'train' of .* rows of 16 tokens"),
        ({"length": 33}, r"--length is 33; use 2 to 32, model.max_length of"),
        ({"split": "dev"}, "no split 'dev'"),
        ({"top_k": VOCABULARY + 1}, f"--top-k is {VOCABULARY + 1}; give a number from 1 to {VOCABULARY}"),
        ({"top_k": None, "samples": 256}, "--samples is 256; give a number from 1 to 255"),
    ],
)
def test_impossible_options_are_named(run, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_cache(run, CacheOptions(**changes), out=tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_teach_are_refused(corpus, tmp_path):
    ahead = replace(PLAIN, depth=MixtureOfDepths(capacity=0.5, causal="none"))
    run = write_run(tmp_path / "ahead", build(MODEL.replace(pattern=(ahead,))), corpus)
    with pytest.raises(ConfigError, match=r"chooses tokens by looking ahead, .* cannot teach"):
        build_cache(run, CacheOptions(rows=2))
    run = write_run(tmp_path / "small", build(MODEL.replace(vocab_size=VOCABULARY - 1)), corpus)
    with pytest.raises(ConfigError, match=r"model.vocab_size is 279"):
        build_cache(run, CacheOptions(rows=2))
    with pytest.raises(RunError, match="is not a run"):
        build_cache(tmp_path / "nowhere", CacheOptions(rows=2))


def test_several_processes_are_refused(run, monkeypatch):
    for name, value in (("COORDINATOR", "localhost:1"), ("PROCESSES", "2"), ("PROCESS", "0")):
        monkeypatch.setenv(f"EFFTRAIN_{name}", value)
    with pytest.raises(ConfigError, match="by one process"):
        build_cache(run, CacheOptions(rows=2))
