import random
import subprocess
import sys

import numpy as np
import pytest

from efftrain.data.storage.encoding import encode_documents
from efftrain.data.storage.token_bytes import byte_level_lengths
from efftrain.data.storage.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_json, train_tokenizer
from efftrain.errors import ConfigError, CorpusError

STRANGE = [
    "",
    " ",
    "\t\tx = 1\r\n\r\n  y\r",
    "\0\x01\x7f\x85\u2028",
    "naïve e\u0301 ﷺ 数据 👩‍👩‍👧‍👦 𝒳 \U0010ffff",
    f"if token == '{END_OF_TEXT}': {END_OF_TEXT}{END_OF_TEXT}",
    "<unk> [UNK] <|end|> Ġ ĊĠ ▁",
    "a" * 10_000,
    "\ufeff# BOM",
]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    points = [rng.randrange(0x110000) for _ in range(300)]
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x + 1\n", "the naïve text\n"] * 50, 350)


@pytest.mark.parametrize("text", [*STRANGE, *map(random_text, range(20))])
def test_encoding_is_lossless_and_its_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert byte_level_lengths(tokenizer)[ids].sum() == len(text.encode())


def test_text_that_spells_the_end_of_text_does_not_become_it(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    for one in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json")):
        (ids,) = encode_documents(one, [f"a{END_OF_TEXT}b"])
        assert (ids == 0).nonzero()[0].tolist() == [0]


def test_a_saved_tokenizer_encodes_the_same(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    for text in STRANGE:
        assert loaded.encode(text).ids == tokenizer.encode(text).ids


def test_every_byte_has_a_token_and_only_the_end_of_text_has_no_bytes(tokenizer):
    lengths = byte_level_lengths(tokenizer)
    assert lengths[0] == 0
    assert (lengths == 1).sum() == 256
    assert (np.delete(lengths, 0) > 0).all()


def test_batches_give_what_single_texts_give(tokenizer):
    texts = [random_text(i) for i in range(50)]
    for ids, text in zip(encode_documents(tokenizer, texts), texts, strict=True):
        assert ids.tolist() == [0, *tokenizer.encode(text).ids]


def test_training_is_the_same_in_every_process():
    """Python's and Rust's hashes are seeded at random in each process; the vocabulary must not depend on them."""
    code = (
        "from efftrain.data.storage.tokenizer import *; import random; r = random.Random(0);"
        "texts = [' '.join(r.choices(['ab','cd','ef','abab','xyz','efcd'], k=50)) for _ in range(200)];"
        "print(tokenizer_json(train_tokenizer(texts, 300)))"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(3)}
    assert len(runs) == 1


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ConfigError, match="257"):
        train_tokenizer(["a"], 256)
    with pytest.raises(CorpusError, match="no tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match="not a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
