"""Bits per byte against sums by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efftrain.errors import ConfigError, CorpusError
from efftrain.measure.quality import evaluate
from efftrain.measure.quality.evaluate import Evaluator, byte_digits
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.sharding.layout import state_shardings
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import use

VOCAB, LENGTH, ROWS = 32, 12, 4
TOKEN_BYTES = np.array([0, *range(1, VOCAB)], np.int32)  # token 0 is special


@pytest.fixture(scope="module")
def model():
    config = llama(vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_length=LENGTH)
    return Decoder(config, rngs=nnx.Rngs(0))


def make_batches(n=3, seed=0):
    """Rows of two documents that each begin with token 0; the last batch is half padding, and the masks have holes."""
    rng = np.random.default_rng(seed)
    batches = []
    for i in range(n):
        stream = rng.integers(1, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
        stream[:, [0, 5]] = 0
        segments = np.broadcast_to(np.where(np.arange(LENGTH) < 5, 1, 2), (ROWS, LENGTH)).astype(np.int32)
        positions = np.broadcast_to(np.r_[0:5, 0 : LENGTH - 5], (ROWS, LENGTH)).astype(np.int32)
        mask = rng.random((ROWS, LENGTH)) < 0.8
        if i == n - 1:
            mask[ROWS // 2 :] = False
            stream[ROWS // 2 :] = 0
        row = {"tokens": stream[:, :-1], "targets": stream[:, 1:], "segments": segments, "positions": positions}
        batches.append(row | {"mask": mask})
    return batches


def by_hand(model, batches):
    """Every document by itself, log softmax in float64."""
    forward = jax.jit(lambda tokens: model(tokens))
    nats = n_targets = n_bytes = 0
    for batch in batches:
        for row in range(ROWS):
            for part in (slice(0, 5), slice(5, LENGTH)):
                logits = np.asarray(forward(batch["tokens"][row : row + 1, part])[0], np.float64)
                log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                for i, target in enumerate(batch["targets"][row, part]):
                    if batch["mask"][row, part][i]:
                        nats -= log_p[i, target]
                        n_targets += 1
                        n_bytes += target  # a token's number is its length here, and 0 is special
    return {"bpb": nats / math.log(2) / n_bytes, "loss": nats / n_targets}


def test_bits_per_byte_by_hand(model):
    """Padding counts for nothing; the end of a document costs nats and brings no bytes."""
    batches = make_batches()
    assert any((b["targets"][b["mask"]] == 0).any() for b in batches)
    assert Evaluator(lambda: batches, TOKEN_BYTES)(model) == pytest.approx(by_hand(model, batches), rel=1e-5)


def test_uniform_model_pays_the_logarithm_of_the_vocabulary(model):
    uniform = nnx.merge(*nnx.split(model))
    uniform.head.kernel[...] = jnp.zeros_like(uniform.head.kernel[...])
    batches = make_batches()
    n_targets = sum(b["mask"].sum() for b in batches)
    n_bytes = sum(TOKEN_BYTES[b["targets"]][b["mask"]].sum() for b in batches)
    found = Evaluator(lambda: batches, TOKEN_BYTES)(uniform)
    assert found["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert found["bpb"] == pytest.approx(math.log2(VOCAB) * n_targets / n_bytes, rel=1e-6)


def test_bytes_that_are_no_whole_numbers_count_as_they_are(model):
    """Of a tokenizer that is not byte-level an entry has its mean over a split."""
    batches, token_bytes = make_batches(), np.random.default_rng(1).uniform(0, 9, VOCAB)
    found = Evaluator(lambda: batches, token_bytes)(model)
    n_targets = sum(b["mask"].sum() for b in batches)
    n_bytes = sum(token_bytes[b["targets"]][b["mask"]].sum() for b in batches)
    assert found["loss"] / math.log(2) / found["bpb"] == pytest.approx(n_bytes / n_targets, rel=1e-7)


def test_sums_of_bytes_are_exact_whatever_the_size_of_a_batch():
    """Five million targets: in float32 one after the other they lose a hundredth and more."""
    token_bytes = np.array([1 / 3, 4.1, 0, 17.999])
    targets = np.random.default_rng(0).integers(0, 4, 5_000_000)
    digits = byte_digits(token_bytes)
    assert digits.dtype == np.int32
    sums = digits[:, targets].sum(1, dtype=np.int32)  # wraps around where it does not fit, as on a device
    found = sum(int(n) / 256**place for place, n in enumerate(sums))
    assert found == pytest.approx(token_bytes[targets].sum(), rel=1e-7)
    assert byte_digits(TOKEN_BYTES).tolist() == [TOKEN_BYTES.tolist()]


def test_bytes_of_a_batch_may_be_more_than_an_int32(model):
    """Forty targets of 2^26 bytes and more."""
    batches, token_bytes = make_batches(), (1 << 26) + np.arange(VOCAB, dtype=np.int32)
    found = Evaluator(lambda: batches, token_bytes)(model)
    counted = [token_bytes[b["targets"]][b["mask"]].sum(dtype=np.int64) for b in batches]
    assert max(counted) > 2**31
    n_targets = sum(b["mask"].sum() for b in batches)
    assert found["loss"] / math.log(2) / found["bpb"] == pytest.approx(sum(counted) / n_targets, rel=1e-12)


def test_every_call_is_a_fresh_pass_and_compiles_nothing_new(model, monkeypatch):
    traced = []
    objective = evaluate.next_token_loss
    monkeypatch.setattr(evaluate, "next_token_loss", lambda *arguments: traced.append(1) or objective(*arguments))
    evaluate.batch_nats.clear_cache()
    evaluator = Evaluator(lambda: iter(make_batches()), TOKEN_BYTES)
    first = evaluator(model)
    assert evaluator(Decoder(model.config, rngs=nnx.Rngs(7)))["bpb"] != first["bpb"]
    assert evaluator(model) == first
    assert len(traced) == 1


def test_max_batches_reads_no_further(model):
    batches = make_batches(3)

    def endless():
        yield from batches[:2]
        raise AssertionError("asked for a third batch")

    some = Evaluator(endless, TOKEN_BYTES, max_batches=2)(model)
    assert some == pytest.approx(by_hand(model, batches[:2]), rel=1e-5)


def test_sharded_model_gives_the_same(model):
    batches = make_batches()
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    graph, state = nnx.split(model)
    sharded = nnx.merge(graph, jax.device_put(state, state_shardings(state, mesh)))
    evaluator = Evaluator(lambda: batches, TOKEN_BYTES)
    expected = evaluator(model)
    with use(mesh):
        assert evaluator(sharded) == pytest.approx(expected, rel=1e-5)
    assert evaluator(sharded) == pytest.approx(expected, rel=1e-5)


def test_rows_without_text_are_refused(model):
    special = make_batches(1)
    special[0]["targets"] = np.zeros_like(special[0]["targets"])
    for batches in ([], special):
        with pytest.raises(CorpusError, match="contain no text to predict"):
            Evaluator(lambda batches=batches: batches, TOKEN_BYTES)(model)


def test_wrong_arguments_are_refused(model):
    with pytest.raises(ConfigError, match="token_bytes has 9 entries; take both from the same tokenizer"):
        Evaluator(make_batches, TOKEN_BYTES[:9])(model)
    with pytest.raises(ConfigError, match=r"evaluation\.max_batches is 0"):
        Evaluator(make_batches, TOKEN_BYTES, max_batches=0)


def test_progress_shows_when_it_takes_long(model, monkeypatch, capsys):
    evaluator = Evaluator(make_batches, TOKEN_BYTES)
    monkeypatch.setattr(evaluate, "SHOW_AFTER_S", 1e6)
    evaluator(model)
    assert "evaluate" not in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "SHOW_AFTER_S", 0.0)
    evaluator(model)
    assert "evaluate: 3/3 batches" in capsys.readouterr().err
    Evaluator(make_batches, TOKEN_BYTES, max_batches=2)(model)
    assert "evaluate: 2/2 batches" in capsys.readouterr().err
    Evaluator(lambda: iter(make_batches()), TOKEN_BYTES, max_batches=2)(model)  # of unknown length
    assert "evaluate: 2/2 batches" in capsys.readouterr().err
