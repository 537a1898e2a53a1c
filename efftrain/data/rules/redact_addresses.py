"""E-mail and IP addresses in texts. Every repetition is bounded: the time is linear in the text."""

import ipaddress
import re
import unicodedata
from zlib import crc32

EMAILS = ("email@example.com", "firstname.lastname@example.org")
NETWORKS = ("192.0.2", "198.51.100", "203.0.113")


def redact_emails(text: str) -> str:
    """Looks at each "@": first for a domain after it, because decorators and operators have none."""
    parts, done = [], 0
    for match in _DOMAIN.finditer(text):
        at = match.start()
        before = _LOCAL_REVERSED.match(text[max(done, at - 65) : at][::-1])
        if before is None or text.startswith(("(", "["), match.end()):  # a call or an index: a product of matrices
            continue
        address = before[0][::-1] + match[0]
        if not address.lower().endswith(_RESERVED):
            parts += [text[done : at - len(before[0])], EMAILS[crc32(address.lower().encode()) % len(EMAILS)]]
            done = match.end()
    return "".join([*parts, text[done:]])


def redact_ipv4(text: str) -> str:
    return _IPV4.sub(_replace_ipv4, text)


def redact_ipv6(text: str) -> str:
    return _IPV6.sub(_replace_ipv6, text) if ":" in text else text


def _replace_ipv4(match: re.Match) -> str:
    try:
        is_public = ipaddress.IPv4Address(match[0]).is_global
    except ValueError:  # a part above 255, or with a leading zero
        return match[0]
    if not is_public or _is_version(match):
        return match[0]
    number = crc32(match[0].encode())
    return f"{NETWORKS[number % 3]}.{1 + number // 3 % 254}"


def _is_version(match: re.Match) -> bool:
    text, start, end = match.string, match.start(), match.end()
    before = text[max(start - 40, 0) : start]
    if _VERSION_BEFORE.search(before) or _VERSION_AFTER.match(text, end):
        return True
    # "1.2.3.4 Title": a heading has small numbers, which random addresses have once in 20,000.
    is_heading = not before.rpartition("\n")[2].strip("# \t") and _TITLE.match(text, end)
    return bool(is_heading) and max(map(int, match[0].split("."))) <= 20


def _replace_ipv6(match: re.Match) -> str:
    written = match[0]
    tail = ":" if written.endswith(":") and not written.endswith("::") else ""
    try:
        address = ipaddress.IPv6Address(written.removesuffix(tail))
    except ValueError:
        return written
    if not address.is_global or sum(map(bool, written.split(":"))) < 3:  # x[2400::2] is a slice
        return written
    return f"2001:db8::{1 + crc32(address.packed) % 0xFFFF:x}{tail}"


def _letters() -> tuple[str, str]:
    """Two sets for a pattern: letters, marks and digits of scripts with spaces between words, and of those without.

    The second are apart because an address may stand directly after a word of them.
    """
    spaceless = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3"
    others = [c for c in map(chr, range(0x80, 0x2000)) if unicodedata.category(c)[0] in "LM" or c.isdigit()]
    apart = re.compile(f"[{spaceless}]")
    return "A-Za-z0-9" + "".join(c for c in others if not apart.match(c)), spaceless


_RESERVED = tuple(f"{before}example.{end}" for before in "@." for end in ("com", "org", "net"))
_SPACED, _SPACELESS = _letters()
# Quotes and '=' may stand in an address, but around one they are nearly always code.
_LOCAL_REVERSED = re.compile(
    rf"[{_SPACED}._%+-]{{0,63}}[{_SPACED}](?![{_SPACED}])|[0-9]{{0,8}}[{_SPACELESS}]{{1,32}}(?![{_SPACELESS}])"
)
_LABEL = r"[{0}](?:[{0}-]{{0,61}}[{0}])?"
_DOMAIN = re.compile(
    rf"@(?:(?:{_LABEL.format(_SPACED)}|{_LABEL.format(_SPACED + _SPACELESS)})\.){{1,8}}"
    rf"(?:[A-Za-z]{{2,24}}(?![{_SPACED}])|xn--[A-Za-z0-9-]{{2,59}}(?![{_SPACED}])|(?![A-Za-z0-9])[{_SPACED}]{{2,24}}"
    rf"(?![{_SPACED}])|中国|中國|香港|台湾|台灣|新加坡|澳門|公司|网络|网址|网店|商城|广告|在线|集团|手机|中文网|我爱你"
    r"|みんな|コム|ストア|한국|닷컴|닷넷|ไทย|คอม)"
)
# The first character stands before what looks back at it: a pattern that begins with a set of characters is found fast.
_IPV4 = re.compile(r"[0-9](?<![0-9A-Za-z_.][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z_]|\.[0-9])")
_VERSION_BEFORE = re.compile(
    r"""
    (?: version\w{0,12} | 版本
      | (?<![a-z]) (?:v|vers?|rev|oid|releases?|firmware|driver|build|section|sect?|chapter|clause|table|figure|appendix)
      | § ) ["'\])]{0,2} \.? \s{0,2} [:=(>]{0,2} \s{0,2} ["'>]? $
    | [=~<>!]= \s{0,2} ["']? $       # a requirement
    | [A-Za-z] [-/] v? $            # pkg-1.2.3.4, Chrome/91.0.4472.124
    """,
    re.IGNORECASE | re.VERBOSE,
)
_VERSION_AFTER = re.compile(
    r"[-+][A-Za-z]|\.(?:tar|t?gz|zip|whl|egg|jar|exe|msi|dll|so|dmg|deb|rpm|apk|orig|dev|post)\b"
)
_TITLE = re.compile(r"\.?[ \t]{1,8}[A-Z]")
# The networks that are given out (IANA), so that times, hexadecimal and slices are none.
_IPV6 = re.compile(r"2(?:00[123]|[468acAC][0-9A-Fa-f]{2})(?<![\w:.]2...)(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]|\.[0-9])")
