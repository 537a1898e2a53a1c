"""Defines the stop words and the punctuation that the rules for prose use."""

import string

from efftrain.errors import ConfigError

# English: the eight words of Gopher (Rae et al. 2021, A.1.1). Other languages: function words of nearly every text.
STOP_WORDS: dict[str, frozenset[str]] = {
    "en": frozenset(("the", "be", "to", "of", "and", "that", "have", "with")),
    "de": frozenset(("der", "die", "das", "und", "zu", "von", "mit", "ist")),
    "es": frozenset(("el", "la", "los", "de", "y", "que", "en", "con")),
    "fr": frozenset(("le", "la", "les", "de", "et", "à", "que", "dans")),
    "it": frozenset(("il", "la", "di", "e", "che", "per", "con", "non")),
    "nl": frozenset(("de", "het", "een", "en", "van", "is", "dat", "met")),
    "pt": frozenset(("o", "a", "de", "e", "que", "do", "para", "com")),
}


def stop_words(language: str) -> frozenset[str]:
    """Returns the stop words of a language, in lower case.

    Args:
      language: the ISO 639-1 code of the language.

    Raises:
      ConfigError: there are no stop words for the language.
    """
    if language not in STOP_WORDS:
        raise ConfigError(
            f"language is {language!r}, for which no stop words are known; use one of {', '.join(sorted(STOP_WORDS))}, "
            "or rules without StopWords"
        )
    return STOP_WORDS[language]


def _characters(ranges: str) -> frozenset[str]:
    """Returns the characters of ranges of hexadecimal code points, such as ``21 3F-40``."""
    pairs = ([int(end, 16) for end in part.split("-")] for part in ranges.split())
    return frozenset(chr(code) for pair in pairs for code in range(pair[0], pair[-1] + 1))


# The characters of Unicode's property Sentence_Terminal, in the version of datatrove 0.10 (utils/text.py): 159.
SENTENCE_ENDS = _characters(
    "21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D6 "
    "17D9-17DA 1803 1809 1944-1945 1AA8-1AAB 1B5A-1B5B 1B5E-1B5F 1B7D-1B7E 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 "
    "2E2E 2E3C 2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB "
    "FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 11047-11048 110BE-110C1 11141-11143 "
    "111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 "
    "1173C-1173E 11944 11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 "
    "16B37-16B38 16B44 16E98 1BC9F 1DA88"
)

# The punctuation of datatrove (utils/text.py); a word of nothing else is a symbol. Bullets and currency signs are
# missing in it, which is why only the presets for datatrove use this set.
DATATROVE_PUNCTUATION = (
    SENTENCE_ENDS
    | frozenset(string.punctuation)
    | _characters(
        "0-8 B-1F 7F-9F AB B4 BB 2013-2014 2019 201C-201E 2026 2236 2501 25BA 3001 3008-300D 3010-3011 FF05 FF08-FF09 "
        "FF0C FF11 FF1A-FF1B FF5E"
    )
)

BULLETS = ("•", "-", "*", "‣", "◦", "⁃", "●", "○", "▪", "■", "–", "·")
ELLIPSES = ("...", "…")
