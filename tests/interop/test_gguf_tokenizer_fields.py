"""Fields of GGUF for tokenizers: what is written is read again as the same tokenizer."""

from pathlib import Path

import pytest
from mixed_text import mixed_text
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from efftrain.data.storage.tokenizer import train_tokenizer
from efftrain.errors import ConfigError
from efftrain.interop.gguf_file import GgufFile
from efftrain.interop.gguf_pre_tokenizers import WORDS
from efftrain.interop.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, GgufTokenizer, read_tokenizer
from efftrain.interop.gguf_tokenizer_fields import tokenizer_fields

TEXT = mixed_text(20_000, digits=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def of(tokenizer: Tokenizer) -> GgufTokenizer:
    return GgufTokenizer(
        tokenizer=tokenizer, bos=None, eos=(0,), pad=0, unk=None, add_bos=False, add_eos=True, chat_template="{{ 1 }}"
    )


def test_trained_tokenizer_is_read_again():
    trained = train_tokenizer([TEXT], 600)
    trained.add_tokens(["<tool>"])
    fields = tokenizer_fields(of(trained), vocabulary=640)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == 640
    again = read_tokenizer(Path("m.gguf"), fields)
    assert again.tokenizer.encode(TEXT).ids == trained.encode(TEXT).ids
    assert again.tokenizer.encode("<tool><|endoftext|>").tokens == ["<tool>", "<|endoftext|>"]
    assert (again.eos, again.pad, again.add_eos, again.chat_template) == ((0,), 0, True, "{{ 1 }}")
    types = fields.pop("tokenizer.ggml.token_type")
    assert [types[number] for number in (0, 1, 600, 639)] == [CONTROL, NORMAL, USER_DEFINED, UNUSED]
    second = tokenizer_fields(again)
    assert {name: second[name] for name in fields} == fields


@pytest.mark.parametrize("name", WORDS)
def test_words_keep_their_name_or_one_of_the_same_words(name):
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=WORDS[name].whole_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = WORDS[name].pre_tokenizer(), decoders.ByteLevel()
    if WORDS[name].nfc:
        tokenizer.normalizer = normalizers.NFC()
    assert WORDS[tokenizer_fields(of(tokenizer))["tokenizer.ggml.pre"]] == WORDS[name]


def test_digits_of_the_original_smollm_are_known():
    tokenizer = train_tokenizer([TEXT], 300)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    assert tokenizer_fields(of(tokenizer))["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES])},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("a"), "removed"), BYTES])},
        {"normalizer": normalizers.Lowercase()},
    ],
    ids=["whitespace", "prefix", "punctuation", "removed", "lowercase"],
)
def test_words_that_llama_cpp_does_not_know_are_one_sentence(change):
    tokenizer = train_tokenizer([TEXT], 300)
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(ConfigError, match="must be a byte-level BPE that cuts words as one of default, gpt-2"):
        tokenizer_fields(of(tokenizer))


def test_vocabularies_that_are_too_small_and_other_models_are_one_sentence():
    with pytest.raises(ConfigError, match="vocabulary is 10 and the tokenizer has 300 ids"):
        tokenizer_fields(of(train_tokenizer([TEXT], 300)), vocabulary=10)
    with pytest.raises(ConfigError, match="pass the tokenizer fields of that file"):
        tokenizer_fields(of(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))))


@pytest.mark.pretrained
def test_published_fields_come_back(smollm2):
    metadata = GgufFile.open(smollm2).metadata
    expected = {name: value for name, value in metadata.items() if name.startswith("tokenizer.")}
    found = tokenizer_fields(read_tokenizer(smollm2, metadata))
    assert found.pop("tokenizer.ggml.add_eos_token") is False
    assert expected.pop("tokenizer.ggml.add_space_prefix") is False  # no meaning for byte-level BPE
    assert found == expected
