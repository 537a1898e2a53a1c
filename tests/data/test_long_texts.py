"""Documents of any length and without any space."""

import itertools
import random
import subprocess
import sys
import time

import pytest
from kinds_of_tokenizers import bert, gpt2, llama2, t5
from tokenizers import Regex, Tokenizer, pre_tokenizers

from efftrain import data
from efftrain.data.storage.encoding import encode_documents
from efftrain.data.storage.long_texts import PART_CHARS, cut_text, without_long_runs
from efftrain.data.storage.tokenizer import load_tokenizer, train_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZE = 2048
ALPHABETS = [
    "ab1. \n\t'",
    "abcdefg  \n",
    "数据 、a1\u3000",
    "ab\r\n--==  ",
    "e\u0301a\u00a0\u2028\u200b 's't ll",
    "-_ ",
]


def llama3() -> Tokenizer:
    tokenizer = gpt2()
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def random_text(alphabet: str, seed: int, n: int = 6000) -> str:
    rng = random.Random(f"{alphabet} {seed}")
    return "".join(rng.choice(alphabet) * rng.choice([1, 1, 1, 2, 5]) for _ in range(n))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("make", [gpt2, llama3, llama2, t5, bert])
def test_parts_have_the_tokens_of_the_whole(tmp_path, make, alphabet):
    make().save(str(tmp_path / "own.json"))
    tokenizer = load_tokenizer(tmp_path / "own.json")
    n_same = 0
    for seed in range(10):
        text = random_text(alphabet, seed)
        parts, changed = cut_text(tokenizer, text, SIZE)
        assert max(stop - start for start, stop in parts) <= SIZE
        assert len(text) / SIZE <= len(parts) <= 1.1 * len(text) / SIZE + 1
        left_out = [text[stop:start] for (_, stop), (start, _) in itertools.pairwise(parts)]
        assert set(left_out) <= ({"", " "} if make is llama2 else {""})
        same = [i for start, stop in parts for i in ids_of(tokenizer, text[start:stop])] == ids_of(tokenizer, text)
        assert same or changed  # a change is never kept silent
        n_same += same
    if make in (gpt2, bert) or (" " in alphabet and make is llama3):
        assert n_same == 10


def test_a_long_document_has_its_tokens_at_its_place():
    tokenizer = train_tokenizer(["some words and 数据\n"] * 20, 280)
    long = "some words, and 数据\n" * 30_000
    assert len(long) > 2 * PART_CHARS
    texts, changed = ["before", long, "", "after" * 3], []
    found = list(encode_documents(tokenizer, texts, on_changed=changed.append))
    assert [ids.tolist() for ids in found] == [[0, *tokenizer.encode(text).ids] for text in texts]
    assert changed == []


def test_a_document_that_is_cut_inside_a_word_is_named(tmp_path, config_for, write_documents, capfd):
    folder = write_documents(tmp_path / "text", n=40)
    (folder / "p03" / "base64.txt").write_text("".join(random.Random(0).choices("abcdefgh", k=PART_CHARS + 9)))
    corpus = data.build(config_for(folder), tmp_path / "out")
    assert corpus.manifest["tokenizer"]["cut_documents"] == 1
    assert "1 long documents, such as p03/base64.txt, have no space" in " ".join(capfd.readouterr().err.split())
    for split in corpus.splits:
        assert corpus.token_bytes()[corpus.tokens(split)[:]].sum() == corpus.splits[split]["bytes"]


@pytest.mark.parametrize("text", [" " * 300_000, "a" * 300_000, "-_" * 150_000, "\n" * 300_000, "7" * 300_000])
def test_training_on_one_long_run_takes_no_time(text):
    started = time.process_time()
    tokenizer = train_tokenizer([text, "some words\n"], 400)
    assert time.process_time() - started < 5
    assert ids_of(tokenizer, text[:10_000])


def test_texts_for_training_are_whole_where_words_are_short():
    text = "def f(x):\n    return x + 1\n" * 5000
    assert list(without_long_runs(text)) == [text]
    long = text + "x" * 50_000 + text + " " * 5000 + "é" * 3000 + text * 3
    pieces = list(without_long_runs(long))
    assert "".join(pieces) == long
    assert max(len(word) for piece in pieces for word in piece.split()) < 2048
    assert max(map(len, pieces)) <= PART_CHARS + 1024
    assert list(without_long_runs("")) == []


MEMORY = """
import resource, sys
from efftrain.data.storage.tokenizer import train_tokenizer
from efftrain.data.storage.encoding import encode_documents
line = "some words of a long document, 1234 and counting\\n"
tokenizer = train_tokenizer([line] * 100, 300)
text = line * ({n_bytes} // len(line))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(ids,) = encode_documents(tokenizer, [text])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, len(ids))
"""


def test_a_long_document_takes_little_memory():
    code = MEMORY.format(n_bytes=20_000_000)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    megabytes, n_tokens = map(int, out.split())
    assert n_tokens > 1_000_000
    assert megabytes < 600


READING = """
import resource, sys
from pathlib import Path
from efftrain.data.corpus import read_documents
from efftrain.data.storage.shards import Serializer, ShardWriter, text_features, write_metadata
folder = Path(sys.argv[1])
features = text_features()
serialize = Serializer(features)
writer = ShardWriter(folder, "text", "train", shard_bytes=1 << 26)
for number in range(60):
    row = {"id": str(number).encode(), "source": b"", "meta": b"{}"}
    writer.write(serialize({"text": b"some words of text " * 200_000, **row}))
write_metadata(folder, "text", features, {"train": writer.finish()}, "")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids = [document.id for document in read_documents(folder, "train")]
assert ids == [str(number) for number in range(60)]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_long_documents_are_read_a_few_at_a_time(tmp_path):
    """230 MB of text in documents of 4 MB."""
    command = [sys.executable, "-c", READING, str(tmp_path)]
    megabytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert megabytes < 400  # the pages of the files, which are mapped into memory, among them
