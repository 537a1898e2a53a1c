"""Computes variants of a text without the effects of layout and storage, which decontamination compares as well.

A model knows a question even if its copy is hyphenated at the end of a line, is part of a numbered listing, or is
contained in a JSON string or an HTML page. Unicode variants are not handled here; see ``dedup.normalise``.
"""

import html
import re

_ESCAPED = re.compile(rb"\\+(?:((?:u[0-9a-fA-F]{4}\\+)*u[0-9a-fA-F]{4})|([nrtbf\"'/]))")
_BREAK = re.compile(rb"</?(?:br|p|div|li|tr|td|th|h[1-6])\b[^<>]{0,400}>", re.IGNORECASE)
_TAG = re.compile(rb"<[a-zA-Z/!][^<>]{0,400}>")
_ENTITY = re.compile(rb"&#?\w{1,31};")
_LINE_NUMBER = re.compile(rb"\n[ \t>|#*(\[]*(?:[Ll](?:ine)?[ \t]?)?\d{1,6}[ \t.:;,)\]|>-]+(?=[^\s])")
# A hyphen of any kind between letters, at the end of a line.
_HYPHEN = re.compile(rb"(?<=[a-zA-Z\x80-\xff])(?:-|\xc2\xad|\xe2\x80[\x90\x91])[ \t]?\n[\s>|]*(?=[a-zA-Z\x80-\xff])")
_HYPHENS = b"-\n", b"- \n", b"-\t\n", b"\xc2\xad", b"\xe2\x80\x90", b"\xe2\x80\x91"  # a faster test than the pattern


def readings(text: bytes) -> list[bytes]:
    """Returns the variants of a text.

    Args:
      text: UTF-8, with newlines as in ``documents.clean_lines``.

    Returns:
      One to three texts in UTF-8: the text; the text with JSON escapes and HTML entities decoded and without tags and
      line numbers; and the latter with words joined that are hyphenated at the end of a line. Variants that are equal
      to the one before are omitted.
    """
    plain = _LINE_NUMBER.sub(b"\n", b"\n" + _resolved(text))[1:]
    joined = _HYPHEN.sub(b"", plain) if any(hyphen in plain for hyphen in _HYPHENS) else plain
    found = [text] if plain == text else [text, plain]
    return found if joined == plain else [*found, joined]


def _resolved(text: bytes) -> bytes:
    """Returns the text with JSON escapes and HTML entities decoded, and without HTML tags."""
    if b"\\" in text:
        text = _ESCAPED.sub(_unescape, text)
    if b"<" in text:
        text = _TAG.sub(b" ", _BREAK.sub(b"\n", text))
    if b"&" in text and _ENTITY.search(text):
        text = html.unescape(text.decode(errors="replace")).encode(errors="replace")
    return text


def _unescape(match: re.Match[bytes]) -> bytes:
    codes, letter = match.groups()
    if letter:
        return b"\n" if letter == b"n" else b" "
    units = (int(code, 16) for code in re.findall(rb"[0-9a-fA-F]{4}", codes))
    return "".join(map(chr, units)).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
