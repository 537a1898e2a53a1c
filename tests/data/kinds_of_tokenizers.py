"""Tokenizers of every kind that is in use, small and trained on the spot; none has its end of text at id 0."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "the alpha beta gamma delta return def class document 1234567890\n",
    "naïve über 数据 epsilon zeta eta theta\n",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def gpt2(texts: Sequence[str] = TEXTS) -> Tokenizer:
    """Byte-level BPE, the end of text last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def llama2(texts: Sequence[str] = TEXTS) -> Tokenizer:
    """SentencePiece BPE with a byte for what is unknown, a space put before every text, and <s> by a template."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = [f" {word}" for text in texts for word in text.split()]  # a merge never goes over a space
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<unk>", "<s>", "</s>", *BYTES], limit_alphabet=40, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def t5(texts: Sequence[str] = TEXTS) -> Tokenizer:
    """Unigram over words, whose entries include the special tokens: its model finds them in a text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("数", "") for text in texts], trainer)  # which is unknown then
    return tokenizer


def bert(texts: Sequence[str] = TEXTS) -> Tokenizer:
    """Lower case, no accents, no white space, [UNK], a template, and texts cut and filled up to 16 tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    return tokenizer


def words(texts: Sequence[str] = TEXTS) -> Tokenizer:
    """A table of words, with a number left out, whose <eos> is an entry like any other."""
    found = sorted({word for text in texts for word in text.split()})
    vocabulary = {"<unk>": 0, "<eos>": 9} | {word: 20 + number for number, word in enumerate(found)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = {
    "gpt2": (gpt2, "<|endoftext|>"),
    "llama2": (llama2, "</s>"),
    "t5": (t5, "</s>"),
    "bert": (bert, "[SEP]"),
    "words": (words, "<eos>"),
}
