"""Corpora of tokenizers that were not trained here."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from kinds_of_tokenizers import KINDS, bert, gpt2, llama2, t5, words
from tokenizers import AddedToken, Tokenizer

from efftrain import data
from efftrain.data.splits import SPLITS
from efftrain.data.storage.encoding import encode_documents
from efftrain.data.storage.token_bytes import byte_level_lengths, round_trip
from efftrain.data.storage.tokenizer import find_end_of_text, load_tokenizer, tokenizer_json, vocabulary_size
from efftrain.data.tasks.items import TaskIds, completions, questions
from efftrain.data.tasks.task import Example
from efftrain.errors import ConfigError, CorpusError
from efftrain.measure.quality.evaluate import Evaluator
from efftrain.measure.quality.unigram import unigram_bpb
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder

LENGTH = 32


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "own.json"))
    return folder / "own.json"


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(kind, tmp_path_factory, documents, config_for) -> data.Corpus:
    folder = tmp_path_factory.mktemp(kind)
    return data.build(config_for(documents, tokenizer=save(KINDS[kind][0](), folder)), folder / "out")


def held_out(corpus: data.Corpus) -> data.LoaderConfig:
    parts = (data.Part(path=corpus.path),)
    return data.LoaderConfig(
        corpora=parts, length=LENGTH, batch_size=8, split="validation", shuffle=False, repeat=False
    )


def n_bytes(corpus: data.Corpus, split: str) -> int:
    return sum(len(document.text.encode()) for document in corpus.documents(split))


def test_the_stream_is_the_library_s_tokens_after_the_end_of_text(built, kind):
    """No template adds a token, nothing is cut or filled up, and the end of text has the id that it has."""
    tokenizer, expected, name = Tokenizer.from_file(str(built.path.parent / "own.json")), [], KINDS[kind][1]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = tokenizer.token_to_id(name)
    assert (built.end_of_text, built.end_of_text_id) == (name, end)
    assert end > 0
    for document in built.documents("train"):
        expected += [end, *tokenizer.encode(document.text, add_special_tokens=False).ids]
    assert built.tokens("train")[:].tolist() == expected
    assert built.vocab_size == max(tokenizer.get_vocab().values()) + 1


def test_a_uniform_model_pays_for_the_bytes_of_the_text(built):
    """Of scripts with three bytes a character, of unknown characters and of lost ones too."""
    model = Decoder(
        llama(vocab_size=built.vocab_size, d_model=8, n_layers=1, n_heads=1, d_ff=8, max_length=LENGTH),
        rngs=nnx.Rngs(0),
    )
    model.head.kernel[...] *= 0
    found = Evaluator(lambda: data.batches(held_out(built)), built.token_bytes())(model)
    n_targets = built.n_tokens("validation") - 1
    expected = n_targets * math.log2(built.vocab_size) / n_bytes(built, "validation")
    assert found["bpb"] == pytest.approx(expected, rel=1e-5)
    # The nats of a batch are a sum in float32; the bytes are exact.
    bytes_per_target = found["loss"] / math.log(2) / found["bpb"]
    assert bytes_per_target == pytest.approx(n_bytes(built, "validation") / n_targets, rel=1e-9)


@pytest.mark.parametrize("split", SPLITS)
def test_the_bytes_of_all_tokens_are_those_of_the_documents(built, split):
    total = built.token_bytes(split)[built.tokens(split)[:]].sum()
    assert total == pytest.approx(n_bytes(built, split), rel=1e-12)
    assert built.token_bytes(split)[built.end_of_text_id] == 0


def test_the_bytes_of_some_rows_are_nearly_those_of_their_text(built):
    """Evaluation may stop early: the first half of the documents has about its own bytes."""
    texts = [document.text for document in built.documents("train")]
    tokens, half = built.tokens("train")[:], len(texts) // 2
    stop = np.flatnonzero(tokens == built.end_of_text_id)[half]
    found = built.token_bytes("train")[tokens[:stop]].sum()
    assert found == pytest.approx(sum(len(text.encode()) for text in texts[:half]), rel=0.02)


def test_rows_begin_a_segment_at_each_end_of_text(built):
    rows = data.PackedRows(built, "train", LENGTH)
    stream, segment = built.tokens("train")[:], 0
    for number in range(len(rows)):
        row = rows[number]
        begins = np.flatnonzero(stream[number * LENGTH :][:LENGTH] == built.end_of_text_id)
        segment = row["segments"].max()
        assert segment == len(set(begins.tolist()) | {0})
        assert (row["positions"][begins] == 0).all()
    last = list(data.batches(held_out(built)))[-1]
    assert (last["segments"] == 0).any()
    assert not last["mask"][last["segments"] == 0].any()
    assert not last["tokens"][last["segments"] == 0].any()


def test_unigram_counts_the_bytes_of_the_text(built):
    n_entries, stream = built.vocab_size, built.tokens("validation")[:]
    counts = np.bincount(built.tokens("train")[:], minlength=n_entries) + 1
    bits = -np.log2(counts / counts.sum())[stream[1:]].sum()
    assert unigram_bpb(built) == pytest.approx(bits / n_bytes(built, "validation"), rel=1e-9)


def test_the_manifest_says_what_a_tokenizer_loses(built, kind):
    described = built.manifest["tokenizer"]
    assert described["lossless"] == (kind in ("gpt2", "llama2"))
    assert (described["lost"] > 0.001) == (kind not in ("gpt2", "llama2"))
    assert described["cut_documents"] == 0


def test_a_lossy_tokenizer_is_reported_once(tmp_path, documents, config_for, capfd):
    data.build(config_for(documents, tokenizer=save(words(), tmp_path)), tmp_path / "words")
    assert " ".join(capfd.readouterr().err.split()).count("Decoding does not restore the text") == 1
    data.build(config_for(documents, tokenizer=save(gpt2(), tmp_path)), tmp_path / "gpt2")
    assert "does not restore the text" not in " ".join(capfd.readouterr().err.split())


def test_a_token_that_a_tokenizer_puts_before_texts_is_said(tmp_path, documents, config_for, capfd):
    """Unless it is the one before each document, which is then as the model was trained."""
    path = save(llama2(), tmp_path)
    said = "The tokenizer itself puts '<s>' before each text, and the documents of this corpus begin with '</s>'"
    data.build(config_for(documents, tokenizer=path), tmp_path / "plain")
    assert said in " ".join(capfd.readouterr().err.split())
    with_bos = data.build(config_for(documents, tokenizer=path, end_of_text="<s>"), tmp_path / "bos")
    assert "The tokenizer itself" not in capfd.readouterr().err
    assert with_bos.tokens("train")[:1] == [1]


def test_the_share_that_is_lost_is_counted_in_bytes(tmp_path):
    """Of capitals, white space that is not one space, and an unknown character."""
    found = round_trip(load_tokenizer(save(bert(), tmp_path)), ["a DEF  世", "the alpha"])
    assert (found.documents, found.changed) == (2, 1)
    assert found.lost == pytest.approx((3 + 2 + 3) / (10 + 9))


@pytest.mark.parametrize("make", [make for make, _ in KINDS.values()])
def test_text_that_spells_a_special_token_does_not_become_it(tmp_path, make):
    tokenizer = load_tokenizer(save(make(), tmp_path))
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    unknown = {tokenizer.token_to_id(name) for name in ("<unk>", "[UNK]")}
    names = [tokenizer.id_to_token(i) for i in special]
    (ids,) = encode_documents(tokenizer, [f"alpha {' '.join(names)} beta{''.join(names)}"])
    assert set(ids.tolist()) & special - unknown == {ids[0]}
    assert (ids == ids[0]).sum() == 1


def test_an_end_of_text_that_is_not_special_in_its_file_becomes_special(tmp_path):
    tokenizer = gpt2()
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    loaded = load_tokenizer(save(tokenizer, tmp_path), "<end>")
    (ids,) = encode_documents(loaded, ["a<end>b"], "<end>")
    assert (ids == tokenizer.token_to_id("<end>")).nonzero()[0].tolist() == [0]
    assert byte_level_lengths(loaded)[ids].sum() == len("a<end>b")


def test_dropout_of_merges_is_switched_off(tmp_path):
    content = json.loads(gpt2().to_str())
    content["model"]["dropout"] = 0.5
    (tmp_path / "own.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "own.json")
    text, end = "alpha beta gamma delta " * 20, tokenizer.token_to_id("<|endoftext|>")
    assert {tuple(ids) for ids in encode_documents(tokenizer, [text] * 5)} == {(end, *gpt2().encode(text).ids)}


def test_the_end_of_text_is_named_or_found(tmp_path, documents, config_for):
    tokenizer = gpt2()
    tokenizer.add_special_tokens(["</s>", "<doc>"])
    path = save(tokenizer, tmp_path)
    loaded = load_tokenizer(path)
    assert find_end_of_text(loaded) == "<|endoftext|>"
    assert find_end_of_text(loaded, "<doc>") == "<doc>"
    named = data.build(config_for(documents, tokenizer=path, end_of_text="<doc>"), tmp_path / "named")
    assert (named.end_of_text, named.end_of_text_id) == ("<doc>", tokenizer.token_to_id("<doc>"))
    assert named.tokens("train")[0:1] == [named.end_of_text_id]
    # Whoever uses the file of this corpus has its end of text without naming it again.
    other = data.build(config_for(documents, tokenizer=named.path / "tokenizer.json", seed=1), tmp_path / "other")
    assert other.end_of_text == "<doc>"
    both = tuple(data.Part(path=corpus.path) for corpus in (named, other))
    assert next(data.batches(replace(held_out(named), corpora=both, split="train", repeat=True)))
    ids = TaskIds(load_tokenizer(named.path / "tokenizer.json"), ("a", "b"), "<doc>")
    ids.write(tmp_path)
    assert TaskIds.read(tmp_path).end_of_text_id == named.end_of_text_id


def test_a_tokenizer_without_an_end_of_text_says_what_to_name(tmp_path, documents, config_for):
    tokenizer = gpt2()
    content = json.loads(tokenizer.to_str().replace("<|endoftext|>", "<|stop|>"))
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    message = r"own\.json.*set corpus\.end_of_text .*special tokens are: '<\|stop\|>'"
    with pytest.raises(ConfigError, match=message):
        data.build(config_for(documents, tokenizer=path), tmp_path / "out")
    with pytest.raises(ConfigError, match="it has no token '<doc>'"):
        data.build(config_for(documents, tokenizer=path, end_of_text="<doc>"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"corpus\.tokenizer is None"):
        config_for(documents, end_of_text="</s>")
    assert data.build(config_for(documents, tokenizer=path, end_of_text="<|stop|>"), tmp_path / "out").end_of_text_id


@pytest.mark.parametrize("make", [llama2, t5, words])
def test_tasks_begin_and_end_with_the_tokenizer_s_end_of_text(tmp_path, make):
    tokenizer = load_tokenizer(save(make(), tmp_path))
    end, ids = tokenizer.token_to_id(find_end_of_text(tokenizer)), TaskIds(tokenizer, ("a", "b"))
    assert ids.answer == vocabulary_size(tokenizer) > max(tokenizer.get_vocab().values())
    (question,) = questions(ids, ["alpha </s> <eos> beta"], [1])
    assert question.sequence[0] == end
    assert (question.sequence == end).sum() == 1
    (completion,) = completions(TaskIds(tokenizer), [Example(text="alpha", answer="beta", line=1)])
    assert completion.sequence[[0, -1]].tolist() == [end, end]


def test_corpora_of_earlier_versions_open(corpus, tmp_path, documents, config_for):
    """Their manifests say nothing of the end of text, and hold no bytes of tokens."""
    former = {name: corpus.manifest["tokenizer"][name] for name in ("vocabulary", "dtype")}
    old = data.Corpus(corpus.path, corpus.manifest | {"tokenizer": former})
    assert (old.end_of_text, old.end_of_text_id) == ("<|endoftext|>", 0)
    assert old.token_bytes().dtype == np.int32
    np.testing.assert_array_equal(old.token_bytes(), corpus.token_bytes())
    lossy = data.build(config_for(documents, tokenizer=save(t5(), tmp_path)), tmp_path / "t5")
    (lossy.path / "token_bytes-validation.npy").unlink()
    with pytest.raises(CorpusError, match=r"no token_bytes-validation\.npy.*build the corpus again"):
        lossy.token_bytes()


def test_the_file_of_a_tokenizer_is_the_same_each_time_it_is_read(tmp_path):
    for make, _ in KINDS.values():
        first = tokenizer_json(load_tokenizer(save(make(), tmp_path)))
        (tmp_path / "own.json").write_text(first)
        assert tokenizer_json(load_tokenizer(tmp_path / "own.json")) == first
