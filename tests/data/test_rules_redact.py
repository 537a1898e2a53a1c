import ipaddress
import re
import sys

import pytest

from efftrain.data.documents import Text
from efftrain.data.rules import Language, Redact, language
from efftrain.errors import ConfigError


def redact(text: str) -> str:
    return Redact().edit(Text(text)).text


@pytest.mark.parametrize(
    "address",
    ["jane.doe@uni-bonn.de", "a@b.co", "x+tag@mail.corp.example.co.uk", "JANE_99%x@SUB.Host.ORG", "-o@host.net"],
)
@pytest.mark.parametrize("frame", ["{}", "Write to {}.", "<{}>", "'{}'", "mail='{}',", "mailto:{}?subject=hi", "({})"])
def test_email_address_goes_and_its_surroundings_stay(address, frame):
    local = address.lstrip("-")  # a hyphen before an address is not taken as part of it
    before, after = frame.split("{}")
    redacted = redact(frame.format(local))
    assert local not in redacted
    assert redacted.startswith(before)
    assert redacted.endswith(after)
    assert re.fullmatch(r"[a-z.]+@example\.(com|org)", redacted.removeprefix(before).removesuffix(after))


@pytest.mark.parametrize(
    "text",
    [
        "user@localhost",
        "@decorator.name",
        "pkg@1.2.3",
        "a @ b.com",
        "me@example.com and you@mail.example.org",
        "10.1.2.3 172.16.0.1 192.168.0.1 127.0.0.1 169.254.1.1 0.0.0.0 255.255.255.255",
        "192.0.2.7 198.51.100.8 203.0.113.9",
        "300.1.1.1 8.8.8 1.2.3.4.5 08.8.8.8",
        "",
        "\0",
    ],
)
def test_what_is_no_personal_address_stays(text):
    before = Text(text)
    assert Redact().edit(before) is before


@pytest.mark.parametrize("frame", ["{}", "ping {}.", "http://{}:80/", "[{}]", "{},"])
def test_public_ip_goes_to_a_network_for_documentation(frame):
    before, after = frame.split("{}")
    address = redact(frame.format("8.8.8.8")).removeprefix(before).removesuffix(after)
    networks = map(ipaddress.ip_network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"))
    assert any(ipaddress.ip_address(address) in network for network in networks)


def test_equal_addresses_have_equal_replacements_in_every_text():
    one = redact("From 8.8.8.8 and 8.8.4.4, jane@doe.de").split()
    other = redact("JANE@doe.de at 8.8.8.8").split()
    assert one[-1] == other[0]
    assert one[1] == other[2]
    assert all(redact(f"{name}@host.de") == redact(f"{name.upper()}@Host.de") for name in "abcdefgh")
    assert len({redact(f"8.8.{i}.{j}") for i in range(20) for j in range(20)}) > 200
    assert {redact(f"{name}@host.de") for name in "abcdefgh"} == {"email@example.com", "firstname.lastname@example.org"}


def test_second_redaction_changes_nothing():
    text = Text(redact("jane@doe.de x.y@z.org 8.8.8.8 1.1.1.1 9.9.9.9"), "id")
    assert Redact().edit(text) is text
    assert Redact().edit(Text("jane@doe.de", "id")).id == "id"


@pytest.mark.parametrize("piece", ["a", "a.", "a@", "a@b.", "@", "1.", "1", "a-", ".", "a@a-"])
def test_time_is_linear_on_text_made_to_backtrack(piece):
    text = piece * (1_000_000 // len(piece)) + "@"
    once = redact(text)
    assert redact(once) == once


ENGLISH = "The harbour lies in a bay that opens to the north, and ships have come here since the first days."
GERMAN = "Der Hafen liegt in einer Bucht, die sich nach Norden öffnet, und seit jeher kommen Schiffe hierher."


@pytest.fixture
def py3langid():
    return pytest.importorskip("py3langid", reason="needs the extra language")


@pytest.mark.usefixtures("py3langid")
@pytest.mark.parametrize(("text", "code"), [(ENGLISH, "en"), (GERMAN, "de")])
def test_language_is_recognised(text, code):
    assert Language(language=code)(Text(text)).keep
    assert not Language(language="fr")(Text(text)).keep
    assert not Language(language={"en": "de", "de": "en"}[code])(Text(text)).keep


@pytest.mark.usefixtures("py3langid")
@pytest.mark.parametrize("text", ["", " ", "\0", "12 + 34", "🎉", "\ud800", "x" * 5_000_000])
def test_text_without_language_is_not_kept(text):
    assert not Language()(Text(text)).keep


@pytest.mark.usefixtures("py3langid")
def test_unknown_language_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'klingon'.*\bde\b.*\ben\b"):
        Language(language="klingon").score(Text(ENGLISH))


def test_missing_py3langid_names_the_remedy(monkeypatch):
    for name in ("py3langid", "py3langid.langid"):
        monkeypatch.setitem(sys.modules, name, None)
    language._identifier.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'efftrain\[language\]'"):
        Language().score(Text(ENGLISH))
