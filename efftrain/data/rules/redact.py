"""Replaces personal addresses and numbers in texts."""

import re
from dataclasses import dataclass
from typing import ClassVar

from efftrain.data.documents import Text
from efftrain.data.rules.redact_addresses import redact_emails, redact_ipv4, redact_ipv6
from efftrain.data.rules.redact_numbers import redact_cards, redact_phones


@dataclass(frozen=True, kw_only=True)
class Redact:
    """Replaces e-mail addresses, public IP addresses, phone and payment-card numbers by reserved ones.

    The following are replaced; the conditions are chosen so that other text is rarely affected:
      - e-mail addresses, in any script on either side of the "@";
      - public IPv4 addresses, unless the surrounding text shows that it is a version, a file or a heading;
      - IPv6 addresses of the networks that are in use, with at least three groups;
      - phone numbers with "+" and a country code, and North American numbers written as (212) 736-5000, or as
        212-736-5000 after a word such as "phone";
      - payment-card numbers: the prefix and length of an issuer and a valid check digit, in groups of digits, or
        without groups near a word such as "card".

    Equal addresses and numbers get equal replacements in every text and run, however they are written. Many originals
    share a replacement, so that the original cannot be recovered. Replacements are reserved for documentation and
    tests, and reserved ones are not replaced, so that applying the edit again changes nothing: example.com, .org and
    .net (RFC 2606), networks that are private, link-local or for documentation (RFC 5737, RFC 3849), and the phone
    numbers 555-0100 to 555-0199. Cards are replaced by two numbers that payment services accept in tests.
    """

    name: ClassVar[str] = "redact"

    def edit(self, text: Text) -> Text:
        before, redacted = text.text, _redact(text.text)
        for _ in range(8):  # a replacement next to a letter or a digit can become part of another address
            if redacted == before:
                break
            before, redacted = redacted, _redact(redacted)
        return text if redacted == text.text else Text(redacted, text.id)


def _redact(text: str) -> str:
    if "@" in text:
        text = redact_emails(text)
    if _DIGITS.search(text):
        for redact in (redact_ipv4, redact_ipv6, redact_phones, redact_cards):
            text = redact(text)
    return text


_DIGITS = re.compile("[0-9]")
