"""Tokenizers of GGUF files: words, merges and markers against plain Python, and the published file."""

import hashlib
import random
import re
from pathlib import Path

import plain_bpe
import pytest
from mixed_text import mixed_text

from efftrain.data.storage.tokenizer import first_difference, load_tokenizer
from efftrain.errors import ModelFileError
from efftrain.interop.gguf_file import GgufFile
from efftrain.interop.gguf_pre_tokenizers import WORDS
from efftrain.interop.gguf_tokenizer import read_tokenizer

ROOT = Path(__file__).parents[2]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_level(pre: str, merges: tuple[str, ...] = ("h e", "l l", "he ll", "hell o", "Ġ hello")) -> dict:
    """Metadata of a byte-level BPE: two markers, the 256 bytes, the merges, and a tool's marker."""
    tokens = ["<|end|>", "<|im_start|>", *plain_bpe.byte_characters().values()]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<tool>"]
    types = [CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 3), USER_DEFINED]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": list(merges)}
    fields |= {"eos_token_id": 0, "eot_token_id": 0, "eom_token_id": 1}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def sentence_pieces(**fields) -> dict:
    """Metadata of a SentencePiece BPE with the scores of ``SCORES``."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SCORES, "  "]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(SCORES), USER_DEFINED]
    scores = [0.0] * 259 + list(SCORES.values()) + [0.0]
    found = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    found |= {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | fields
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}


def _scores() -> dict[str, float]:
    rng = random.Random(3)
    pieces = dict.fromkeys("".join(rng.choices("▁abc", k=rng.randint(2, 5))) for _ in range(120))
    return {piece: -float(i) for i, piece in enumerate(pieces)} | {char: -1000.0 - i for i, char in enumerate("▁abc")}


SCORES = _scores()


def tokenizer_of(metadata):
    return read_tokenizer(Path("m.gguf"), metadata)


def test_the_tokens_that_a_file_adds_to_texts_are_added(tmp_path):
    """As SentencePiece's and Llama 3's files do without a word; what corpora are encoded with adds none."""
    plain = tokenizer_of(sentence_pieces())
    assert plain.with_added_tokens().encode("ab").tokens == ["<s>", *plain.tokenizer.encode("ab").tokens]
    both = tokenizer_of(sentence_pieces(add_bos_token=True, add_eos_token=True)).with_added_tokens()
    assert both.encode("ab").ids == [1, *plain.tokenizer.encode("ab").ids, 2]
    assert both.encode("ab", add_special_tokens=False).ids == plain.tokenizer.encode("ab").ids
    none = tokenizer_of(byte_level("gpt-2")).with_added_tokens()
    assert none.encode("hello").tokens == ["hello"]
    for name, tokenizer in (("plain", plain.tokenizer), ("both", both)):
        tokenizer.save(str(tmp_path / name))
    loaded = [load_tokenizer(tmp_path / name) for name in ("plain", "both")]
    assert first_difference(*loaded) is None  # a corpus fits both


# One word a bar.
GPT2_WORDS = "I|'ve| 1234| DON|'|T|!?|\n\n| $|x|  | y| \t"
LLAMA3_WORDS = "I|'ve| |123|4| DON|'T|!?\n\n| $|x|  | y| \t"


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", GPT2_WORDS),
        ("olmo", GPT2_WORDS),
        ("smollm", GPT2_WORDS.replace(" 1234", " |1|2|3|4")),
        ("starcoder", GPT2_WORDS.replace(" 1234", " |1|2|3|4")),
        ("llama-bpe", LLAMA3_WORDS),
        ("qwen2", LLAMA3_WORDS.replace("123|4", "1|2|3|4")),
        ("default", "I|'|ve| |123|4| DON|'|T|!?|\n\n |$|x|  | y| \t"),
    ],
)
def test_words(pre, words):
    text = "I've 1234 DON'T!?\n\n $x   y \t"
    pieces = tokenizer_of(byte_level(pre)).tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == words.split("|")


@pytest.mark.parametrize(("pre", "words"), [("gpt-2", plain_bpe.gpt2_words), ("smollm", plain_bpe.smollm_words)])
def test_byte_level_bpe_is_that_of_plain_python(pre, words):
    metadata, text = byte_level(pre), mixed_text(20_000, digits=True) + " hello hellohell he\nhello"
    found = tokenizer_of(metadata).tokenizer.encode(text).ids
    ids = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    assert found == plain_bpe.encode(words(text), ids, metadata["tokenizer.ggml.merges"])
    assert tokenizer_of(metadata).tokenizer.decode(found) == text


def test_words_that_are_entries_need_no_merges_in_llama_3():
    merges = ("h e", "l l", "ll o")
    with_entry = byte_level("llama-bpe", merges)
    with_entry["tokenizer.ggml.tokens"] += ["hello"]
    with_entry["tokenizer.ggml.token_type"] += [NORMAL]
    assert tokenizer_of(with_entry).tokenizer.encode("hello").tokens == ["hello"]
    assert tokenizer_of(with_entry | {"tokenizer.ggml.pre": "qwen2"}).tokenizer.encode("hello").tokens == ["he", "llo"]


def test_markers_are_one_id_and_known_by_their_purpose():
    found = tokenizer_of(byte_level("gpt-2"))
    encoded = found.tokenizer.encode("<|im_start|>hello<tool><|end|>")
    assert encoded.tokens == ["<|im_start|>", "hello", "<tool>", "<|end|>"]
    assert found.tokenizer.decode(encoded.ids) == "hello<tool>"  # special ones are skipped, user-defined ones are not
    assert (found.bos, found.eos, found.pad, found.unk) == (None, (0, 1), None, None)
    assert (found.add_bos, found.add_eos, found.chat_template) == (False, False, None)
    assert tokenizer_of(byte_level("llama-bpe")).add_bos


def test_sentence_piece_merges_by_score_as_plain_python():
    found, rng = tokenizer_of(sentence_pieces()), random.Random(5)
    changed = 0
    for _ in range(500):
        text = "".join(rng.choices(["a", "b", "c", " b", "a a", "é", "日"], k=rng.randint(1, 30)))
        tokens = found.tokenizer.encode(text).tokens
        assert tokens == plain_bpe.sentence_piece(text, SCORES)
        assert found.tokenizer.decode(found.tokenizer.encode(text).ids) == text
        changed += len(tokens) < len(text)
    assert changed > 100
    assert (found.bos, found.eos, found.unk, found.add_bos) == (1, (2,), 0, True)


def test_sentence_piece_finds_markers_and_user_defined_entries():
    tokens = tokenizer_of(sentence_pieces()).tokenizer.encode("<s>é  é</s>").tokens
    assert tokens == ["<s>", "▁", "<0xC3>", "<0xA9>", "  ", "▁", "<0xC3>", "<0xA9>", "</s>"]


def test_space_before_a_text_only_where_the_file_says_so():
    found = tokenizer_of(sentence_pieces(add_space_prefix=False, add_bos_token=False))
    assert found.tokenizer.encode("é é").tokens == ["<0xC3>", "<0xA9>", "▁", "<0xC3>", "<0xA9>"]
    assert found.tokenizer.decode(found.tokenizer.encode(" é é").ids) == " é é"
    assert not found.add_bos


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pre", "tekken", f"pre is 'tekken', and only {', '.join(WORDS)} can be read"),
        ("pre", None, f"pre is missing, and only {', '.join(WORDS)} can be read"),
        ("pre", 3, "pre is 3 and must be of the type str"),
        ("model", "bert", "model is 'bert', and only gpt2"),
        ("model", None, "model is missing, and only gpt2"),
        ("tokens", None, "tokens must be a list of the type str"),
        ("tokens", ["a", 1], "tokens must be a list of the type str"),
        ("tokens", ["a", "b", "a"], "tokens has the entry 'a' twice"),
        ("token_type", [1, 2], "token_type has 2 entries for 264 tokens"),
        ("merges", None, "merges must be a list of the type str"),
        ("merges", ["he"], "merges has the entry 'he', which does not join"),
        ("merges", ["h e", "q q"], "merges has the entry 'q q', which does not join"),
        ("eos_token_id", 10**6, "eos_token_id is 1000000 and there are 264 tokens"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(field, value, message):
    metadata = byte_level("gpt-2") | {f"tokenizer.ggml.{field}": value}
    if value is None:
        del metadata[f"tokenizer.ggml.{field}"]
    if field == "tokens":
        metadata.pop("tokenizer.ggml.token_type")
    with pytest.raises(ModelFileError, match=re.escape(message)) as caught:
        tokenizer_of(metadata)
    assert str(caught.value).startswith("m.gguf: tokenizer.ggml.")
    assert "\n" not in str(caught.value)


@pytest.mark.pretrained
def test_published_tokenizer_is_that_of_plain_python(smollm2):
    file = GgufFile.open(smollm2)
    tokenizer = read_tokenizer(smollm2, file.metadata).tokenizer
    files = [ROOT / "README.md", ROOT / "LICENSE", *sorted((ROOT / "efftrain" / "interop").glob("*.py"))]
    text = mixed_text(100_000, digits=True) + "".join(path.read_text(encoding="utf-8") for path in files)
    ids = {token: number for number, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
    merges = file.metadata["tokenizer.ggml.merges"]
    plain = re.sub(r"<\|?\w+\|?>", "", text)  # without markers, which plain Python does not know
    assert tokenizer.encode(plain).ids == plain_bpe.encode(plain_bpe.smollm_words(plain), ids, merges)
    assert tokenizer.decode(tokenizer.encode(plain).ids) == plain


# transformers 5.24.0 loses the cut between digits when it reads the file, so its ids count on texts without digits:
#   tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
#   ids = tokenizer(mixed_text(100_000, digits=False))["input_ids"]
#   len(ids), hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
DIGEST_OF_TRANSFORMERS = (54530, "19546dc2ed140a97846bb03452021f2f232778877d333b86e4305b9c75da1bb2")


@pytest.mark.pretrained
def test_published_tokenizer_is_that_of_transformers_on_texts_without_digits(smollm2):
    found = read_tokenizer(smollm2, GgufFile.open(smollm2).metadata)
    ids = found.tokenizer.encode(mixed_text(100_000, digits=False)).ids
    assert (len(ids), hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()) == DIGEST_OF_TRANSFORMERS


@pytest.mark.pretrained
def test_published_markers_are_one_id(smollm2):
    found = read_tokenizer(smollm2, GgufFile.open(smollm2).metadata)
    assert found.tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids == [1, 4093, 198, 6004, 2]
    assert (found.bos, found.eos, found.pad, found.unk, found.add_bos) == (1, (2,), 2, 0, False)
    assert found.chat_template is not None
    assert "<|im_start|>assistant" in found.chat_template
