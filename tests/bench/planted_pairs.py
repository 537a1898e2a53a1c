"""Labelled pairs of texts for ``near_duplicates``: in bands of exact similarity, the same, and not the same."""

import bisect
import re
import unicodedata
from collections.abc import Callable, Iterator

import numpy as np

SHINGLE = 5  # words
BANDS = range(50, 100, 5)  # lower ends, in percent

Words = list[str]
Rng = np.random.Generator
Make = Callable[[Rng], tuple[str, str]]


def prose(rng: Rng, n: int) -> Words:
    """Words in a row from Python's manual, which lies beside every interpreter."""
    start = int(rng.integers(0, len(_MANUAL) - n))
    return _MANUAL[start : start + n]


def _manual() -> Words:
    from pydoc_data.topics import topics

    return [word for text in topics.values() for word in text.split() if re.fullmatch("[A-Za-z]+[.,]?", word)]


def vocabulary(rng: Rng, letters: str, low: int, high: int, n: int = 20_000) -> Words:
    ends = np.cumsum(rng.integers(low, high + 1, n))
    text = "".join(rng.choice(list(letters), ends[-1]))
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def zipf(rng: Rng, words: Words, n: int) -> Words:
    weights = 1 / np.arange(10, 10 + len(words))
    return [words[i] for i in rng.choice(len(words), n, p=weights / weights.sum())]


def edit(rng: Rng, words: Words, share: float, new: Callable[[], str]) -> Words:
    """Some words, scattered, replaced by others."""
    edited = words.copy()
    for i in rng.choice(len(words), max(round(share * len(words)), 1), replace=False):
        edited[i] = new()
    return edited


def jaccard(one: Words, other: Words) -> float:
    a, b = ({*zip(*(words[i:] for i in range(SHINGLE)), strict=False)} for words in (one, other))
    return len(a & b) / len(a | b)


def of_band(rng: Rng, low: float) -> tuple[str, str]:
    """A text and its copy with a block or scattered words replaced, of a similarity in [low, low + .05)."""
    while True:
        words = [word.lower().strip(".,") for word in prose(rng, int(rng.integers(150, 400)))]
        size = len(words)
        order = rng.permutation(size) if rng.random() < 0.5 else np.roll(range(size), rng.integers(size))
        target = low + rng.uniform(0.0, 0.05)

        others = _invented(rng, size)

        def edited(n: int, words: Words = words, order: np.ndarray = order, others: Words = others) -> Words:
            new = {*order[:n].tolist()}
            return [others[i] if i in new else word for i, word in enumerate(words)]

        n = bisect.bisect_left(range(size), -target, key=lambda n: -jaccard(words, edited(n)))
        if low <= jaccard(words, edited(n)) < low + 0.05:
            return " ".join(words), " ".join(edited(n))


def planted(n: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """n pairs of each band and case."""
    rng = np.random.default_rng(seed)
    pairs = {f"J .{low:02d}-": [of_band(rng, low / 100) for _ in range(n)] for low in BANDS}
    for cases in (DIFFERENT, SAME, OTHERS):
        pairs |= {case: [make(rng) for _ in range(n)] for case, make in cases.items()}
    return pairs


def corpora(seed: int) -> dict[str, list[str]]:
    """Texts of several scripts whose hashing is timed."""
    rng = np.random.default_rng(seed)
    makers = {
        "ASCII": english,
        "English with curly quotes": lambda rng: SAME["curly quotes"](rng)[1],
        "German": lambda rng: " ".join(zipf(rng, GERMAN, 250)),
        "Cyrillic": lambda rng: " ".join(zipf(rng, RUSSIAN, 250)),
        "Chinese": lambda rng: "".join(zipf(rng, CHINESE, 400)),
        "Korean": lambda rng: " ".join(zipf(rng, KOREAN, 250)),
    }
    return {name: [make(rng) for _ in range(250)] for name, make in makers.items()}


def boilerplate(own: int) -> Make:
    def make(rng: Rng) -> tuple[str, str]:
        shared = prose(rng, 200)
        return tuple(" ".join([*shared[:100], *_invented(rng, own), *shared[100:]]) for _ in "ab")

    return make


def template(words: Callable[[Rng, int], Words], every: int, new: Callable[[Rng], str]) -> Make:
    """The same text with one word in ``every`` its own."""

    def make(rng: Rng) -> tuple[str, str]:
        shared = words(rng, 300)
        return tuple(" ".join(new(rng) if i % every == 7 else word for i, word in enumerate(shared)) for _ in "ab")

    return make


def invoice(rng: Rng) -> tuple[str, str]:
    """Lines of the same goods; numbers, prices and dates are each invoice's own."""
    goods = [" ".join(prose(rng, 2)) for _ in range(25)]

    def lines() -> Iterator[str]:
        day = f"2024-{rng.integers(1, 13)}-{rng.integers(1, 29)}"
        yield f"Invoice {rng.integers(10**6)} of {day}, please pay in 30 days."
        for item in goods:
            yield f"{rng.integers(1, 20)} pieces of {item} at {rng.integers(1, 99)}.{rng.integers(10, 99)} each"

    return "\n".join(lines()), "\n".join(lines())


def _invented(rng: Rng, n: int) -> Words:
    """Words that occur once. Without digits, which datatrove takes for one and the same."""
    return vocabulary(rng, "bcdfghjklmnpqrstvwxz", 8, 12, n)


def rewritten(words: Callable[[Rng], str], change: Callable[[str], str]) -> Make:
    def make(rng: Rng) -> tuple[str, str]:
        text = words(rng)
        return text, change(text)

    return make


def edited(words: Words, joint: str, share: float = 0.03, n: int = 300) -> Make:
    def make(rng: Rng) -> tuple[str, str]:
        text = zipf(rng, words, n)
        return joint.join(text), joint.join(edit(rng, text, share, lambda: words[rng.integers(len(words))]))

    return make


def one_changed(n: int) -> Make:
    return rewritten(
        lambda rng: " ".join(prose(rng, n)), lambda text: re.sub(r"^(\S+ \S+ \S+) \S+", r"\1 another", text)
    )


def quoted(rng: Rng) -> str:
    """A quotation, an apostrophe or a dash in every line of 12 words."""
    forms = ('"{0} {1}" {2}', "{0}'s {1} {2}", "{0} - {1} {2}", '"{0}", {1} {2}')
    words = prose(rng, 240)
    return "\n".join(
        forms[i // 12 % 4].format(*words[i : i + 3]) + " " + " ".join(words[i + 3 : i + 12]) for i in range(0, 240, 12)
    )


def english(rng: Rng) -> str:
    return " ".join(prose(rng, 250))


def every(number: int, old: str, new: str) -> Callable[[str], str]:
    """Replaces one occurrence in ``number``."""

    def change(text: str) -> str:
        parts = text.split(old)
        return "".join(part + (new if i % number == 0 else old) for i, part in enumerate(parts[:-1])) + parts[-1]

    return change


def shuffled(rng: Rng) -> tuple[str, str]:
    words = prose(rng, 320)
    paragraphs = [" ".join(words[i : i + 40]) for i in range(0, 320, 40)]
    return "\n\n".join(paragraphs), "\n\n".join(paragraphs[i] for i in rng.permutation(8))


def framed(rng: Rng) -> tuple[str, str]:
    """One of the two has a header and a footer, three words for each ten of the text."""
    words = prose(rng, 300)
    return " ".join(words), " ".join([*_invented(rng, 45), *words, *_invented(rng, 45)])


_MANUAL = _manual()
_made = np.random.default_rng(0)
RUSSIAN = vocabulary(_made, "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэф", 2, 12)
FRENCH = vocabulary(_made, "eeeasitnrulodcmpéàèêçôûïù", 2, 11)
GERMAN = vocabulary(_made, "enisratdhulcgmobwfkzvpüäößj", 2, 13)
CHINESE = vocabulary(_made, "".join(map(chr, range(0x4E00, 0x4E00 + 3000))), 1, 3)
KOREAN = vocabulary(_made, "".join(map(chr, range(0xAC00, 0xAC00 + 2000))), 2, 4)
THAI = vocabulary(_made, "".join(map(chr, [*range(0xE01, 0xE2F), *range(0xE40, 0xE45)])), 2, 7)

DIFFERENT = {
    "not: 200 words boilerplate + 50 own": boilerplate(50),
    "not: 200 words boilerplate + 100 own": boilerplate(100),
    "not: template, 1 word in 15 differs": template(prose, 15, lambda rng: prose(rng, 1)[0]),
    "not: template, 1 name in 20 differs": template(prose, 20, lambda rng: _invented(rng, 1)[0]),
    "not: invoices that differ in numbers": invoice,
    "not: 1 word in 25 a changed number": template(prose, 25, lambda rng: str(rng.integers(10**6))),
    "not: Chinese template, 1 word in 15": template(
        lambda rng, n: zipf(rng, CHINESE, n), 15, lambda rng: CHINESE[rng.integers(20_000)]
    ),
    "not: Korean template, 1 word in 15": template(
        lambda rng, n: zipf(rng, KOREAN, n), 15, lambda rng: KOREAN[rng.integers(20_000)]
    ),
    "not: Korean template, 1 word in 10": template(
        lambda rng, n: zipf(rng, KOREAN, n), 10, lambda rng: KOREAN[rng.integers(20_000)]
    ),
}
"""Pairs that are texts of their own, though much of their words is shared."""

SAME = {
    "Cyrillic in capitals": rewritten(lambda rng: " ".join(zipf(rng, RUSSIAN, 250)), str.upper),
    "curly quotes": rewritten(quoted, lambda text: text.replace(' "', " “").replace('"', "”").replace("'", "’")),
    "no-break space, one in ten": rewritten(english, every(10, " ", "\u00a0")),
    "no-break spaces": rewritten(english, every(1, " ", "\u00a0")),
    "em dash for hyphen": rewritten(
        lambda rng: every(8, " ", " - ")(english(rng)), lambda text: text.replace(" - ", "—")
    ),
    "full-width commas": rewritten(
        lambda rng: ",".join("".join(zipf(rng, CHINESE, 6)) for _ in range(40)), lambda text: text.replace(",", "，")
    ),
    "full-width letters": rewritten(
        english, lambda text: "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)
    ),
    "soft hyphens": rewritten(english, lambda text: re.sub("([aeiou])(?=[b-z]{2})", "\\1\u00ad", text)),
    "zero-width spaces": rewritten(english, every(3, "e", "e\u200b")),
    "ligatures": rewritten(english, lambda text: text.replace("fi", "ﬁ").replace("fl", "ﬂ").replace("st", "ﬆ")),
    "French, decomposed": rewritten(
        lambda rng: " ".join(zipf(rng, FRENCH, 250)), lambda text: unicodedata.normalize("NFD", text)
    ),
    "German in capitals": rewritten(lambda rng: " ".join(zipf(rng, GERMAN, 250)), str.upper),
    "Korean, 3 % of words edited": edited(KOREAN, " "),
    "Korean, decomposed": rewritten(
        lambda rng: " ".join(zipf(rng, KOREAN, 250)), lambda text: unicodedata.normalize("NFD", text)
    ),
    "Chinese, 2 % of words edited": edited(CHINESE, "", 0.02),
    "Thai, 3 % of words edited": edited(THAI, ""),
    "5 words, case and punctuation": rewritten(
        lambda rng: " ".join(prose(rng, 5)).lower(), lambda text: text.title().replace(" ", ", ") + "!"
    ),
}
"""Pairs that a reader would call the same."""

OTHERS = {
    "Chinese, 3 % of words edited": edited(CHINESE, "", 0.03),
    "Russian, 3 % of words edited": edited(RUSSIAN, " "),
    "header and footer of 30 %": framed,
    "truncated to .8": rewritten(english, lambda text: " ".join(text.split()[:200])),
    "truncated to .6": rewritten(english, lambda text: " ".join(text.split()[:150])),
    "paragraphs of 40 words shuffled": shuffled,
    "10 words, one changed": one_changed(10),
    "20 words, one changed": one_changed(20),
    "30 words, one changed": one_changed(30),
}
"""Pairs on either side of the threshold, by its definition."""
