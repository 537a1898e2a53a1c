"""Texts on which tokenizers differ: code, runs of white space, scripts, emoji and digits. The same on every machine."""

import random

_PROSE = (
    "the model reads a text and writes another one, which we'll score; it's cheap, isn't it? They've said I'm late, "
    "you'd say: don't! HELLO World camelCase snake_case __init__ e.g. naïve café Zürich coöperate São straße İstanbul"
)
_WORDS = tuple(_PROSE.split())
_CODE = (
    "def f(x: int) -> str:\n    return f'{x!r}'  # TODO\n",
    "\tif (a[i] != b[i]) { break; }\r\n\r\n",
    '<div class="x">&nbsp;</div>\n',
    "SELECT * FROM t WHERE a >= b AND c <> 'd';\n\n\n",
    "x = y ** z // w % v @ u; assert not (p and q or r)\n",
)
_SPACES = (" ", "  ", "   \n", "\n\n  \n", "\t\t", " \t ", "\u00a0", "\u3000", "\u2003 ", "\r\n", "        ", "\n")
_SCRIPTS = (
    "中文文本没有空格",
    "日本語のテキスト、カタカナ。",
    "한국어 문장입니다",
    "Привет, мир!",
    "Ελληνικά",
    "नमस्ते दुनिया",
    "مرحبا بالعالم",
    "שלום",
    "e\u0301a\u0308",
)
_EMOJI = ("😀", "👩\u200d👩\u200d👧", "🇪🇺", "❤️", "👍🏽", "→", "≤", "…", "“quoted”", "—", "\u200b", "$€£", "'S", "''")
_DIGITS = (
    "7",
    "42",
    "1234",
    "3.14159",
    "2026-11-28",
    "0x1F",
    "1,000,000",
    "½",
    "Ⅷ",
    "٣٤",
    "x2",
    "10th",
    "5²",
    "a1b22c",
)


def mixed_text(n_chars: int, *, digits: bool) -> str:
    """Returns at least ``n_chars`` characters of all kinds in random order; without digits if so wished."""
    rng = random.Random(0)
    kinds = [_WORDS, _WORDS, _WORDS, _CODE, _SPACES, _SPACES, _SCRIPTS, _EMOJI] + [_DIGITS] * digits
    parts, length = [], 0
    while length < n_chars:
        part = rng.choice(rng.choice(kinds)) + (" " if rng.random() < 0.6 else "")
        parts.append(part)
        length += len(part)
    return "".join(parts)
