"""Encodes documents as token ids, in bounded memory whatever the length of a document."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from efftrain.data.batching import by_size
from efftrain.data.storage.long_texts import cut_text
from efftrain.data.storage.tokenizer import find_end_of_text, text_encoder

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_BATCH_CHARS = 1 << 20


def encode_documents(
    tokenizer: "Tokenizer",
    texts: Iterable[str],
    end_of_text: str | None = None,
    *,
    observe: Callable[[str, "Encoding"], None] | None = None,
    on_changed: Callable[[int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Yields the int32 ids of each text: the end-of-text token, then the tokens of the text. Uses all cores.

    A text of more than ``long_texts.PART_CHARS`` characters is encoded in parts, see ``long_texts.cut_text``.

    Args:
      tokenizer: a tokenizer from ``load_tokenizer`` or ``train_tokenizer``.
      texts: the texts of the documents.
      end_of_text: the token between documents. None: the one that ``find_end_of_text`` finds.
      observe: called with each part of a text and its encoding. Encodings have token offsets only if it is given.
      on_changed: called with the index of a text if its tokens may differ from those of the undivided text. The text is
        the last one that was read from ``texts``.
    """
    begin = np.array([tokenizer.token_to_id(find_end_of_text(tokenizer, end_of_text))], np.int32)
    encoder = text_encoder(tokenizer)
    encode = encoder.encode_batch if observe else encoder.encode_batch_fast
    n_parts: deque[int] = deque()  # number of parts of each text that is not complete yet

    def parts() -> Iterator[str]:
        for number, text in enumerate(texts):
            cuts, changed = cut_text(encoder, text)
            if changed and on_changed:
                on_changed(number)
            n_parts.append(len(cuts))
            yield from (text[start:stop] for start, stop in cuts)

    held = [begin]
    for batch in by_size(parts(), _BATCH_CHARS):
        for part, encoding in zip(batch, encode(batch, add_special_tokens=False), strict=True):
            if observe:
                observe(part, encoding)
            held.append(np.array(encoding.ids, np.int32))
            if len(held) > n_parts[0]:
                yield np.concatenate(held)
                n_parts.popleft()
                held = [begin]
