"""Generates small synthetic tasks for use without real data: questions to a shop, and amounts in words."""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

# Intents share most words, so that only their combination tells them apart. {o}: opening, {i}: item, {p}: place,
# {t}: time.
INTENTS: dict[str, tuple[str, ...]] = {
    "where_is_order": ("{o} where is my {i}", "{o} my {i} has not come to {p} yet", "{o} track the {i} I ordered"),
    "late_order": ("{o} my {i} is late", "{o} the {i} should have come {t}", "{o} still waiting for a {i} since {t}"),
    "cancel_order": ("{o} cancel my {i}", "{o} I do not want the {i} that I ordered {t}", "{o} do not send the {i}"),
    "change_address": ("{o} send my {i} to {p}", "{o} I moved to {p}", "{o} the {i} should go to {p} and not to {p}"),
    "return_item": ("{o} send back my {i}", "{o} I want to return the {i} from {t}", "{o} how do I return a {i}"),
    "refund_missing": ("{o} I returned the {i} and have no money", "{o} where is my money for the {i}",
                       "{o} no refund since {t}"),
    "damaged_item": ("{o} my {i} came broken", "{o} the {i} that came {t} has a crack", "{o} the {i} does not work"),
    "wrong_item": ("{o} I ordered a {i} and got a {i}", "{o} this is not the {i} I ordered", "{o} you sent me a {i}"),
    "in_stock": ("{o} do you have a {i}", "{o} when is the {i} back in {p}", "{o} is the {i} sold out"),
    "price_question": ("{o} how much is a {i}", "{o} what does the {i} cost in {p}", "{o} is the {i} cheaper than {t}"),
    "voucher_fails": ("{o} my code for the {i} does not work", "{o} the voucher from {t} is refused",
                      "{o} no discount on the {i}"),
    "payment_fails": ("{o} I cannot pay for the {i}", "{o} my card is refused for the {i}", "{o} paid twice for a {i}"),
}  # fmt: skip
WORDS = {
    "o": ("hello", "hi there", "please", "can you help", "excuse me", "I have a question", "sorry to ask", "hey", "so",
          "good morning", "quick one", "help"),
    "i": ("kettle", "lamp", "pair of shoes", "blue jacket", "phone case", "garden chair", "book", "bicycle pump",
          "desk", "water bottle", "tent", "coffee grinder", "pillow", "raincoat", "toy train", "headphones"),
    "p": ("Leeds", "my office", "the new flat", "the shop in town", "Bristol", "my neighbour", "York", "the station"),
    "t": ("yesterday", "last week", "Monday", "two weeks ago", "the weekend", "March", "this morning", "Friday"),
}  # fmt: skip
ENDINGS = ("", "", "?", ".", " thanks", ", what now?", " please", "!!")
TYPOS, OTHER_WORDS = 0.04, 0.1  # probability of a typo per letter; of beginning with the words of another intent

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ASKING = ("it costs {}", "that is {} in all", "we owe them {}", "{} please", "the bill says {}", "you paid {}")


def write_questions(folder: Path, *, n_labelled: int = 1500, n_unlabelled: int = 300, n_test: int = 300) -> None:
    """Writes ``labelled.csv``, ``unlabelled.csv`` and ``test.csv`` with questions to a shop (text, label).

    The files are the same in each call.
    """
    drawn = _distinct(_question, n_labelled + n_unlabelled + n_test)
    _write(folder / "labelled.csv", ("text", "label"), drawn[:n_labelled])
    _write(folder / "test.csv", ("text", "label"), drawn[n_labelled : n_labelled + n_test])
    _write(folder / "unlabelled.csv", ("text",), ((text,) for text, _ in drawn[n_labelled + n_test :]))


def write_amounts(folder: Path, *, n_labelled: int = 1500, n_unlabelled: int = 300, n_test: int = 300) -> None:
    """Writes the same files with amounts in words (prompt) and figures (completion).

    An example is ``we owe them two pounds ten`` with the completion ``2.10``.
    """
    drawn = _distinct(_amount, n_labelled + n_unlabelled + n_test)
    _write(folder / "labelled.csv", ("prompt", "completion"), drawn[:n_labelled])
    _write(folder / "test.csv", ("prompt", "completion"), drawn[n_labelled : n_labelled + n_test])
    _write(folder / "unlabelled.csv", ("prompt",), ((text,) for text, _ in drawn[n_labelled + n_test :]))


def in_words(number: int) -> str:
    """Returns a number from 0 to 999 in words, such as ``three hundred and five``."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
    rest = f" and {in_words(number % 100)}" if number % 100 else ""
    return f"{ONES[number // 100]} hundred{rest}"


def _question(random: np.random.Generator) -> tuple[str, str]:
    names = list(INTENTS)
    label = names[random.integers(len(names))]
    text = _filled(INTENTS[label], random)
    if random.random() < OTHER_WORDS:
        other = _filled(INTENTS[names[random.integers(len(names))]], random).split(" ", 1)[1]
        text = f"not about {other}, but {text}"
    return _mistyped(text, random) + ENDINGS[random.integers(len(ENDINGS))], label


def _filled(templates: tuple[str, ...], random: np.random.Generator) -> str:
    text = templates[random.integers(len(templates))]
    for kind, choices in WORDS.items():
        while f"{{{kind}}}" in text:
            text = text.replace(f"{{{kind}}}", choices[random.integers(len(choices))], 1)
    return text


def _mistyped(text: str, random: np.random.Generator) -> str:
    letters = list(text)
    for i, letter in enumerate(letters):
        if letter.isalpha() and random.random() < TYPOS:
            letters[i] = ("", letter * 2, chr(ord("a") + int(random.integers(26))))[random.integers(3)]
    return "".join(letters)


def _amount(random: np.random.Generator) -> tuple[str, str]:
    pounds, pence = int(random.integers(1, 1000)), int(random.integers(0, 100))
    said = f"{in_words(pounds)} pound{'s' if pounds > 1 else ''}"
    if pence:
        said += (f" {in_words(pence)}", f" and {in_words(pence)} pence")[random.integers(2)]
    return ASKING[random.integers(len(ASKING))].format(said), f"{pounds}.{pence:02d}"


def _distinct(draw: Callable[[np.random.Generator], tuple[str, str]], n: int) -> list[tuple[str, str]]:
    random, found = np.random.default_rng(77), {}
    while len(found) < n:
        text, label = draw(random)
        found.setdefault(" ".join(text.casefold().split()), (" ".join(text.split()), label))
    return list(found.values())


def _write(path: Path, header: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
