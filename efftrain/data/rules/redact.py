"""Personal addresses in texts."""

import ipaddress
import re
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

from efftrain.data.documents import Text

EMAILS = ("email@example.com", "firstname.lastname@example.org")
NETWORKS = ("192.0.2", "198.51.100", "203.0.113")


@dataclass(frozen=True, kw_only=True)
class Redact:
    """Replaces e-mail addresses and public IPv4 addresses by ones that are reserved for documentation.

    Equal addresses get equal replacements, in every text and run; many addresses share one, so that nobody can look
    up which it was. What is reserved already stays, so that a second time changes nothing: addresses at example.com,
    .org and .net (RFC 2606), networks that are private, loopback, link-local or for documentation (RFC 5737). A
    version number of four parts looks like an address and is replaced like one.
    """

    name: ClassVar[str] = "redact"

    def edit(self, text: Text) -> Text:
        redacted = text.text
        if "@" in redacted:
            redacted = _EMAIL.sub(_replace_email, redacted)
        redacted = _IPV4.sub(_replace_ip, redacted)
        return text if redacted == text.text else Text(redacted, text.id)


def _replace_email(match: re.Match) -> str:
    address = match[0]
    if address.lower().endswith(_RESERVED):
        return address
    return EMAILS[crc32(address.lower().encode()) % len(EMAILS)]


def _replace_ip(match: re.Match) -> str:
    try:
        is_public = ipaddress.IPv4Address(match[0]).is_global
    except ValueError:  # a part above 255, or with a leading zero
        return match[0]
    if not is_public:
        return match[0]
    number = crc32(match[0].encode())
    return f"{NETWORKS[number % 3]}.{1 + number // 3 % 254}"


_RESERVED = tuple(f"{before}example.{end}" for before in "@." for end in ("com", "org", "net"))
# Every repetition is bounded: the time is linear in the text. Quotes and '=' may stand in an address, but around one
# they are nearly always code.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
_IPV4 = re.compile(r"(?<![0-9])(?<![0-9]\.)[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9]|\.[0-9])")
