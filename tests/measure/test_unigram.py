"""Bits per byte of token frequencies."""

import math
from collections import Counter

from efftrain import data
from efftrain.data.storage.encoding import encode_documents
from efftrain.measure.quality.unigram import unigram_bpb


def test_it_is_the_cross_entropy_by_counting(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(30):
        package = tmp_path / "a" / f"p{i % 6}"
        package.mkdir(exist_ok=True)
        text = "\n".join(f"value_{(i * j) % 7} = other[{j % 3}]" for j in range(30))
        (package / f"{i}.py").write_text(text)
    source = data.TextFolder(path=tmp_path / "a", pattern="*.py", group_by_folder=True)
    built = data.CorpusConfig(sources=(source,), rules=(), vocabulary=280, deduplicate=False, decontaminate=None)
    data.build(built, tmp_path / "c")
    corpus = data.open(tmp_path / "c")

    def stream(split: str) -> list[int]:
        texts = [d.text for d in corpus.documents(split)]
        return [int(t) for tokens in encode_documents(corpus.tokenizer(), texts) for t in tokens]

    seen, held_out = stream("train"), stream("validation")[1:]
    counts, total = Counter(seen), len(seen) + corpus.vocab_size
    bits = -sum(math.log2((counts[t] + 1) / total) for t in held_out)
    n_bytes = sum(len(d.text.encode()) for d in corpus.documents("validation"))
    assert math.isclose(unigram_bpb(corpus), bits / n_bytes, rel_tol=1e-9)
