"""The quality of a unigram model, which only knows the frequency of each token: a baseline for every other model."""

import numpy as np

from efftrain.data.corpus import Corpus, TokenStream

CHUNK = 1 << 20  # number of tokens that are read at once


def unigram_bpb(corpus: Corpus, *, split: str = "validation") -> float:
    """Bits per byte of a split under the token frequencies of the training split, with add-one smoothing.

    Counted as in ``evaluate.Evaluator``: all tokens after the first one are targets, and ends of texts have nats but no
    bytes.
    """
    n_entries = corpus.vocab_size
    counts = _counts(corpus.tokens("train"), n_entries) + 1.0
    seen = _counts(corpus.tokens(split), n_entries)
    seen[corpus.end_of_text_id] -= 1  # the first token of the stream is not a target
    nats = -(seen * np.log(counts / counts.sum())).sum()
    return float(nats / np.log(2) / (seen * corpus.token_bytes(split)).sum())


def _counts(tokens: TokenStream, n_entries: int) -> np.ndarray:
    found = np.zeros(n_entries, np.float64)
    for start in range(0, len(tokens), CHUNK):
        found += np.bincount(tokens[start : start + CHUNK], minlength=n_entries)
    return found
