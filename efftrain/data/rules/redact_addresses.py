"""Redacts e-mail and IP addresses. Every repetition in a pattern is bounded, so that the time is linear in the text."""

import ipaddress
import re
import unicodedata
from functools import lru_cache
from zlib import crc32

EMAILS = ("email@example.com", "firstname.lastname@example.org")
NETWORKS = ("192.0.2", "198.51.100", "203.0.113")


def redact_emails(text: str) -> str:
    """Replaces e-mail addresses. A domain after "@" is searched for first, since decorators and operators have none."""
    parts, done = [], 0
    for match in _DOMAIN.finditer(text):
        at = match.start()
        before = _LOCAL_REVERSED.match(text[max(done, at - 65) : at][::-1])
        if before is None or text.startswith(("(", "["), match.end()):  # a call or an index: a product of matrices
            continue
        address = before[0][::-1] + match[0]
        if not address.lower().endswith(_RESERVED):
            address = EMAILS[crc32(address.lower().encode()) % len(EMAILS)]
        parts += [text[done : at - len(before[0])], address]
        done = match.end()
    return "".join([*parts, text[done:]])


def redact_ipv4(text: str) -> str:
    return _IPV4.sub(_replace_ipv4, text)


def redact_ipv6(text: str) -> str:
    return _IPV6.sub(_replace_ipv6, text) if ":" in text else text


def _replace_ipv4(match: re.Match) -> str:
    return match[0] if not _is_public(match[0]) or _is_version(match) else _reserved_ipv4(match[0])


@lru_cache(maxsize=1 << 12)
def _is_public(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_global
    except ValueError:  # a part above 255, or with a leading zero
        return False


def _reserved_ipv4(address: str) -> str:
    number = crc32(address.encode())
    return f"{NETWORKS[number % 3]}.{1 + number // 3 % 254}"


def _is_version(match: re.Match) -> bool:
    """Returns whether the text around four numbers shows that they are not an address."""
    text, end = match.string, match.end()
    before = text[max(match.start() - 40, 0) : match.start()]
    if before.endswith(("-", "/")) and before[-2:-1].isalpha():  # pkg-1.2.3.4, Chrome/91.0.4472.124
        return True
    named = before.rstrip(_BETWEEN)  # version = "1.2.3.4"
    found = _NAME.search(named)
    name = found[0].lower() if found else ""
    if "version" in name or name.rpartition("_")[2] in _NUMBERED or before.rstrip(" \"'").endswith(_COMPARISONS):
        return True
    if _VERSION_AFTER.match(text, end):
        return True
    # "1.2.3.4 Title": a heading has four small numbers, which are rare among addresses.
    is_heading = not before.rpartition("\n")[2].strip("# \t\"'([*") and _TITLE.match(text, end)
    return bool(is_heading) and max(map(int, match[0].split("."))) <= 50


def _replace_ipv6(match: re.Match) -> str:
    written = match[0]
    tail = ":" if written.endswith(":") and not written.endswith("::") else ""
    return _reserved_ipv6(written.removesuffix(tail)) + tail


@lru_cache(maxsize=1 << 12)
def _reserved_ipv6(written: str) -> str:
    """Returns the replacement, or the same text if it is not a public address or too short: x[2400::2] is a slice."""
    try:
        address = ipaddress.IPv6Address(written)
    except ValueError:
        return written
    if not address.is_global or sum(map(bool, written.split(":"))) < 3:
        return written
    return f"2001:db8::{1 + crc32(address.packed) % 0xFFFF:x}"


def _letters() -> tuple[str, str]:
    """Returns two sets for a pattern: letters, marks and digits of scripts with spaces between words, and without.

    The scripts without spaces are separate because an address may follow one of their words directly.
    """
    spaceless = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3"
    others = [c for c in map(chr, range(0x80, 0x2000)) if unicodedata.category(c)[0] in "LM" or c.isdigit()]
    apart = re.compile(f"[{spaceless}]")
    return "A-Za-z0-9" + "".join(c for c in others if not apart.match(c)), spaceless


_RESERVED = tuple(f"{before}example.{end}" for before in "@." for end in ("com", "org", "net"))
_SPACED, _SPACELESS = _letters()
# Quotes and '=' are allowed in an address, but around one they are nearly always code.
_LOCAL_REVERSED = re.compile(
    rf"[{_SPACED}._%+-]{{0,63}}[{_SPACED}](?![{_SPACED}])|[0-9]{{0,8}}[{_SPACELESS}]{{1,32}}(?![{_SPACELESS}])"
)
_LABEL = "[{0}](?:[{0}-]{{0,61}}[{0}])?".format(_SPACED + _SPACELESS)
_DOMAIN = re.compile(
    rf"@(?:{_LABEL}\.){{1,8}}"
    rf"(?:xn--[A-Za-z0-9-]{{2,59}}|[A-Za-z]{{2,24}}|(?![A-Za-z0-9])[{_SPACED}]{{2,24}}"
    r"|中国|中國|香港|台湾|台灣|新加坡|澳門|公司|网络|网址|网店|商城|广告|在线|集团|手机|中文网|我爱你|みんな|コム|ストア|한국|닷컴"
    rf"|닷넷|ไทย|คอม)(?![{_SPACED}])"
)
# The lookbehind follows the first character, because patterns that begin with a set of characters are found faster.
_IPV4 = re.compile(r"[0-9](?<![0-9A-Za-z_.][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z_]|\.[0-9])")
_BETWEEN = " \t\n\"'=:>()[]."
_NAME = re.compile(r"[\w§]{0,24}\Z")
_COMPARISONS = ("==", ">=", "<=", "~=", "!=")
_NUMBERED = frozenset(("v", "ver", "vers", "rev", "release", "firmware", "driver", "build", "oid", "§", "版本"))
_NUMBERED |= {"section", "sec", "sect", "chapter", "clause", "table", "figure", "appendix"}
_VERSION_AFTER = re.compile(
    r"[-+][A-Za-z]|\.(?:tar|t?gz|zip|whl|egg|jar|exe|msi|dll|so|dmg|deb|rpm|apk|orig|dev|post)\b"
)
_TITLE = re.compile(r"\.?[ \t]{1,8}[A-Z]")
# Only the networks that IANA has allocated, so that times, hexadecimal numbers and slices are not matched.
_IPV6 = re.compile(
    r"2(?:00[123]|[468acAC][0-9A-Fa-f]{2})(?<![\w:.]2...)(?::[0-9A-Fa-f]{0,4}){2,7}(?!\w|:[\w:]|\.[0-9])"
)
