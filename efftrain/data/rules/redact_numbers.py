"""Redacts phone and payment-card numbers. Repetitions in patterns are bounded: the time is linear in the text."""

import re
from zlib import crc32

# Payment services accept these numbers in tests only.
CARDS = ("4000000000000002", "4000000000000010")


def redact_phones(text: str) -> str:
    if "+" in text:
        text = _INTERNATIONAL.sub(_replace_phone, text)
    if "-" in text:
        text = _NORTH_AMERICAN.sub(_replace_phone, text)
    return text


def redact_cards(text: str) -> str:
    return _CARD.sub(_replace_card, text)


def _replace_phone(match: re.Match) -> str:
    written = match[0]
    digits = _NOT_DIGITS.sub("", written.replace("(0)", ""))
    if written[0] == "+":
        if not _is_international(written, digits):
            return written
    else:
        if written[0] != "(" and not _PHONE_WORD.search(match.string[max(match.start() - 24, 0) : match.start()]):
            return written
        digits = "1" + digits
    if digits[0] == "1" and digits[4:9] == "55501":
        return written
    return f"+1-202-555-01{crc32(digits.encode()) % 100:02d}"


def _is_international(written: str, digits: str) -> bool:
    separators = _SEPARATORS.findall(written)
    if not 9 <= len(digits) <= 15 or _DATE.search(written):
        return False
    if not separators:  # a large number looks the same, so that the conditions are stricter
        return 11 <= len(digits) <= 13 and not digits.endswith("0000")
    return "." not in separators or (len(separators) > 1 and set(separators) == {"."})  # not decimal fractions


def _replace_card(match: re.Match) -> str:
    digits = _NOT_DIGITS.sub("", match[0])
    if digits in CARDS or not _ISSUER.fullmatch(digits) or not _has_check_digit(digits):
        return match[0]
    if digits == match[0]:  # without groups it may be any number, since many numbers of 16 digits pass these checks
        around = match.string[max(match.start() - 40, 0) : match.end() + 24].lower()
        if not any(word in around for word in _CARD_WORDS):
            return digits
    return CARDS[crc32(digits.encode()) % len(CARDS)]


def _has_check_digit(digits: str) -> bool:
    """Luhn's check: every second digit from the right is doubled, and the digits of the results are summed."""
    return sum(_DOUBLED[int(d)] if i % 2 else int(d) for i, d in enumerate(reversed(digits))) % 10 == 0


_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
_NOT_DIGITS = re.compile("[^0-9]")
_SEPARATORS = re.compile("[^0-9+()]")
_DATE = re.compile(r"(?:19|20)[0-9]{2}[-/.][0-9]{2}[-/.][0-9]{2}")
_PHONE_WORD = re.compile(
    r"\b(?:tele)?(?:phone|tel|fax|call|cell|mobile|ph|hotline)\b[^\w\n]{0,4}(?:\w{2,8} )?(?:1[-. ])?$", re.I
)
# The numbering plans of +1 and +7 have a fixed length and are matched strictly. Country codes: ITU-T E.164.
_INTERNATIONAL = re.compile(
    r"""
    \+ (?<![\w+.]\+)
    (?: 1 [ .-]? \(?[2-9][0-9]{2}\)? [ .-]{0,2} [2-9][0-9]{2} [ .-]? [0-9]{4}
      | 7 [ -]? \(?[3-9][0-9]{2}\)? [ -]? [0-9]{3} [ -]? [0-9]{2} [ -]? [0-9]{2}
      | (?: 2[07] | 3[0-469] | 4[013-9] | 5[1-8] | 6[0-6] | 8[1246] | 9[0-58]
          | 2[1-69][0-9] | 3[578][0-9] | 42[013] | 5[09][0-9] | 6[7-9][0-9] | 8[058][0-9] | 9[679][0-9] )
        (?: [ ./\u00a0-]? \(?[0-9]{1,5}\)? ){2,6} )
    (?! \w | [ .-]?[0-9] )
    """,
    re.VERBOSE,
)
_NORTH_AMERICAN = re.compile(
    r"\((?<!\w\()[2-9][0-9]{2}\)[ ]?[2-9][0-9]{2}-[0-9]{4}(?!\w|-[0-9])"
    r"|[2-9](?<![\w.+-][2-9])[0-9]{2}-[2-9][0-9]{2}-[0-9]{4}(?!\w|[-.][0-9])"
)
_CARD = re.compile(
    r"""
    [2-6] (?<![\w.,+-][2-6]) (?<![0-9]{4}[ ][2-6])
    (?: [0-9]{12,18}
      | [0-9]{3} ([ -]) [0-9]{4} \1 [0-9]{4} \1 [0-9]{4} (?:\1[0-9]{3})?
      | [0-9]{3} ([ -]) [0-9]{6} \2 [0-9]{4,5} )
    (?! \w | [.,:-][0-9] | [ ][0-9]{4}(?![0-9]) )  # in a row of numbers
    """,
    re.VERBOSE,
)
_CARD_WORDS = ("card", "visa", "amex", "discover", "diners", "jcb", "unionpay", "credit", "debit", "cvv", "cvc")
# Visa, Mastercard (two ranges), American Express, Discover, Diners Club, JCB, UnionPay.
_ISSUER = re.compile(
    r"4[0-9]{12}(?:[0-9]{3}){0,2}|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}"
    r"|3[47][0-9]{13}|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}|3(?:0[0-5]|[689][0-9])[0-9]{11}"
    r"|35(?:2[89]|[3-8][0-9])[0-9]{12}|62[0-9]{14,17}"
)
