"""The quality of a model that knows how frequent each token is, and nothing else: what every other model gains on."""

import numpy as np

from efftrain.data.corpus import Corpus, TokenStream

CHUNK = 1 << 20  # tokens read at once


def unigram_bpb(corpus: Corpus, *, split: str = "validation") -> float:
    """Bits per byte of a split by the frequencies of the training split, each count one larger.

    As the evaluator counts: all tokens behind the first one are targets, ends of texts have nats and no bytes.
    """
    n_entries = corpus.vocab_size
    counts = _counts(corpus.tokens("train"), n_entries) + 1.0
    seen = _counts(corpus.tokens(split), n_entries)
    seen[corpus.end_of_text_id] -= 1  # the first token of the stream is no target
    nats = -(seen * np.log(counts / counts.sum())).sum()
    return float(nats / np.log(2) / (seen * corpus.token_bytes(split)).sum())


def _counts(tokens: TokenStream, n_entries: int) -> np.ndarray:
    found = np.zeros(n_entries, np.float64)
    for start in range(0, len(tokens), CHUNK):
        found += np.bincount(tokens[start : start + CHUNK], minlength=n_entries)
    return found
