import gzip
import random
import tracemalloc

import pytest
import zstandard
from warc_archives import KINDS, page, places, read, read_parts, record, texts, url

from efftrain.data.documents import UNREADABLE, Document, Skipped
from efftrain.data.sources import base as sources

TEXTS = texts(9)


def archive(kind: str) -> list[bytes]:
    """An archive of nine records, one part each."""
    return [KINDS[kind](record(url(n), text.encode())) for n, text in enumerate(TEXTS)]


def found(items: list[Document | Skipped]) -> dict[str, str]:
    return {item.meta.get("url", item.id): item.text for item in items if isinstance(item, Document)}


def losses(items: list[Document | Skipped]) -> list[Skipped]:
    return [item for item in items if isinstance(item, Skipped)]


def without(*lost: int) -> dict[str, str]:
    return {url(n): text for n, text in enumerate(TEXTS) if n not in lost}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [-20, -1, 7, 3000, 10**6, 10**12])
def test_a_wrong_length_loses_its_own_record(tmp_path, kind, error):
    parts = archive(kind)
    block = TEXTS[3].encode()
    wrong = record(url(3), block, length=max(len(block) + error, 0))
    parts[3] = KINDS[kind](wrong)
    items = read_parts(tmp_path, kind, parts)
    assert found(items) == without(3)
    (lost,) = losses(items)
    assert (lost.rule, lost.n_bytes) == ("bad_record", len(wrong))
    assert url(3) in lost.detail
    assert f"{len(wrong):,} bytes were skipped" in lost.detail


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_in_one_member_is_picked_up_at_the_next_header(tmp_path, kind):
    block = TEXTS[3].encode()
    parts = [record(url(n), text.encode()) for n, text in enumerate(TEXTS)]
    parts[3] = record(url(3), block, length=len(block) + 40)
    parts[6] = record(url(6), TEXTS[6].encode(), length=1)
    items = read_parts(tmp_path, kind, [KINDS[kind](b"".join(parts))])
    assert found(items) == without(3, 6)
    assert [(lost.rule, lost.n_bytes) for lost in losses(items)] == [
        ("bad_record", len(parts[3])),
        ("bad_record", len(parts[6])),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aligned", [True, False])
def test_a_length_beyond_what_is_held_loses_its_own_record(tmp_path, monkeypatch, kind, aligned):
    """The block is passed over without being held, and the reader goes back when no record follows it."""
    monkeypatch.setattr(sources, "MAX_BYTES", 5000)
    parts = [record(url(n), text.encode()) for n, text in enumerate(TEXTS * 40)]
    parts[3] = record(url(3), TEXTS[3].encode(), length=100_000)
    packed = [KINDS[kind](part) for part in parts] if aligned else [KINDS[kind](b"".join(parts))]
    items = read_parts(tmp_path, kind, packed)
    assert found(items) == {url(n): text for n, text in enumerate(TEXTS * 40) if n != 3}
    assert [(lost.rule, lost.n_bytes) for lost in losses(items)] == [("bad_record", len(parts[3]))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [b"", b"\r\n", b"\n\n", b"\r\n" * 9])
def test_other_line_ends_after_a_record_lose_nothing(tmp_path, kind, end):
    parts = [KINDS[kind](record(url(n), text.encode()).removesuffix(b"\r\n\r\n") + end) for n, text in enumerate(TEXTS)]
    items = read_parts(tmp_path, kind, [*parts, KINDS[kind](record(None, b"", "metadata"))])
    assert found(items) == without()
    assert not losses(items)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rubbish", [b"\n", b"rubbish", bytes(range(1, 256)) * 300, b"\x1f\x8b\x08\x28\xb5\x2f\xfd" * 9]
)
def test_rubbish_between_records_loses_no_record(tmp_path, kind, rubbish):
    parts = archive(kind)
    items = read_parts(tmp_path, kind, [*parts[:4], rubbish, *parts[4:]])
    assert found(items) == without()
    if rubbish.strip():
        (lost,) = losses(items)
        assert lost.rule == "bad_record"
        assert lost.n_bytes == len(rubbish)


@pytest.mark.parametrize("kind", ["warc.gz", "warc.zst"])
def test_rubbish_within_members_loses_no_record(tmp_path, kind):
    parts = archive(kind)
    parts[4] = KINDS[kind](b"rubbish")
    items = read_parts(tmp_path, kind, parts)
    assert found(items) == without(4)
    assert [(lost.rule, lost.n_bytes) for lost in losses(items)] == [("bad_record", 7)]


@pytest.mark.parametrize("kind", ["warc.gz", "warc.zst"])
def test_a_flipped_bit_loses_its_own_record(tmp_path, kind):
    """At every byte of a member: never the record before or after, and never a text with another letter in it."""
    parts = archive(kind)
    for n in (4, 8):  # between others, and the last
        for at in range(0, len(parts[n]), 7 if len(parts[n]) > 500 else 1):
            broken = bytearray(parts[n])
            broken[at] ^= 1 << at % 8
            items = read_parts(tmp_path, kind, [*parts[:n], bytes(broken), *parts[n + 1 :]])
            assert without(n).items() <= found(items).items() <= without().items(), at
            if len(found(items)) < len(TEXTS):
                (lost,) = losses(items)
                assert lost.n_bytes > 0
                assert lost.rule == "bad_record" or n == 8


@pytest.mark.parametrize("kind", ["warc.gz", "warc.zst"])
def test_a_damaged_text_at_the_end_is_one_bad_record(tmp_path, kind):
    """No member follows, but what is lost is no more than the rest of this record."""
    parts = [*archive(kind), KINDS[kind](record(url(9), random.Random(0).randbytes(3000)))]
    broken = bytearray(parts[9])
    broken[2000] ^= 1
    items = read_parts(tmp_path, kind, [*parts[:9], bytes(broken)])
    assert found(items) == without()
    assert [lost.rule for lost in losses(items)] == ["bad_record"]


@pytest.mark.parametrize("kind", ["warc.gz", "warc.zst"])
def test_damage_in_a_member_of_many_records_is_a_loss_of_the_file(tmp_path, kind):
    many = {url(n): text for n, text in enumerate(texts(1000))}
    packed = bytearray(KINDS[kind](b"".join(record(name, text.encode()) for name, text in many.items())))
    packed[len(packed) // 2 : len(packed) // 2 + 999] = random.Random(0).randbytes(999)
    items = read_parts(tmp_path, kind, [bytes(packed)])
    assert losses(items)[-1].rule == UNREADABLE
    assert "records that were read from it may be altered" in losses(items)[-1].detail
    assert len(found(items)) > 300
    if kind == "warc.gz":  # of the frame, the last bytes are the first that show the damage
        assert len(found(items)) < 600
        assert found(items).items() <= many.items()


def test_damage_of_one_piece_leaves_what_was_unpacked_before_it(tmp_path):
    """The decoder keeps nothing of a call that fails, here of 8 kB of packed bytes."""
    parts = [record(url(n), text.encode()) for n, text in enumerate(TEXTS)]
    packed = bytearray(gzip.compress(b"".join(parts)))
    assert len(packed) < 8000
    packed[-200:] = b"\xff" * 200
    items = read_parts(tmp_path, "warc.gz", [bytes(packed)])
    assert len(found(items)) >= 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_keeps_all_records_before_the_cut(tmp_path, kind):
    parts = archive(kind)
    whole = b"".join(parts)
    ends = [end for _, end in places(parts)]
    for cut in range(1, len(whole), 13):
        items = read_parts(tmp_path, kind, [whole[:cut]])
        n_whole = sum(end - 4 * (kind == "warc") <= cut for end in ends)  # the text is whole before its line ends
        assert found(items) == without(*range(n_whole, len(TEXTS))), cut
        assert [lost.rule for lost in losses(items)] == ([] if cut in ends else [UNREADABLE]), cut
        if cut not in ends:
            assert int(losses(items)[0].id.partition("@")[2]) <= len(b"".join(map(str.encode, TEXTS))) + 9 * 200


def test_headers_that_run_together_put_no_text_under_another_name(tmp_path):
    """Bytes are missing from the end of one header to the next, so that they look like one."""
    parts = archive("warc")
    parts[3] = parts[3][: parts[3].index(b"Content-Length")]
    parts[6] = parts[6][: parts[6].index(b"\r\n\r\n")] + b"\r\n"
    parts[7] = parts[7].removeprefix(b"WARC/1.0\r\n")
    items = read_parts(tmp_path, "warc", parts)
    assert found(items) == without(3, 6, 7)
    assert {lost.rule for lost in losses(items)} == {"bad_record"}


def test_a_plain_file_without_its_last_line_ends_may_be_cut(tmp_path):
    (text, lost) = read_parts(tmp_path, "warc", [record(url(0), b"text")[:-2]])
    assert text.text == "text"
    assert lost.rule == UNREADABLE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"", b"not an archive at all\n" * 99])
def test_a_file_without_a_record_is_unreadable(tmp_path, kind, content):
    for content_as_it_is in (True, False):
        items = read_parts(tmp_path, kind, [content if content_as_it_is or not content else KINDS[kind](content)])
        assert [item.rule for item in items] == [UNREADABLE]


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_without_what_its_header_must_have(tmp_path, kind):
    parts = archive(kind)
    no_length = parts[2] = b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\ntext\r\n\r\n"
    parts[2] = KINDS[kind](parts[2])
    no_type = record(url(5), b"text").replace(b"WARC-Type", b"X-Type")
    parts[5] = KINDS[kind](no_type)
    parts[7] = KINDS[kind](record(None, TEXTS[7].encode()))
    parts.append(KINDS[kind](page(b"<p>words</p>", url=None)))
    items = read_parts(tmp_path, kind, parts)
    texts_found = [item.text for item in items if isinstance(item, Document)]
    assert texts_found[:-1] == [text for n, text in enumerate(TEXTS) if n not in (2, 5)]
    assert texts_found[-1].strip() == "words"
    assert [(lost.rule, lost.n_bytes) for lost in losses(items)] == [
        ("bad_record", len(no_length)),
        ("bad_record", len(no_type)),
    ]
    assert items[-1].meta == {}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_large_to_hold_is_passed_over(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "MAX_BYTES", 1 << 20)
    bomb = bytes(60 << 20)
    parts = archive("warc")
    parts[4] = record(url(4), bomb)
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"".join(KINDS[kind](part) for part in parts))
    del bomb, parts
    tracemalloc.start()
    items = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found(items) == without(4)
    assert [lost.rule for lost in losses(items)] == ["too_large"]
    assert peak < 50 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_members_may_be_cut_anywhere(tmp_path, kind):
    """As parallel packers do: a member is then no boundary of a record."""
    whole = b"".join(record(url(n), text.encode()) for n, text in enumerate(TEXTS))
    items = read_parts(tmp_path, kind, [KINDS[kind](whole[at : at + 700]) for at in range(0, len(whole), 700)])
    assert found(items) == without()
    assert not losses(items)


def test_padding_after_the_last_member_is_no_damage(tmp_path):
    items = read_parts(tmp_path, "warc.gz", [*archive("warc.gz"), bytes(100_000)])
    assert found(items) == without()
    assert not losses(items)


@pytest.mark.parametrize("packed_dictionary", [False, True])
def test_frames_with_a_dictionary_in_the_first_frame(tmp_path, packed_dictionary):
    samples = [f"Ein Satz über {n} Fische und {n * 7} Vögel.".encode() * 5 for n in range(2000)]
    dictionary = zstandard.train_dictionary(4096, samples)
    content = dictionary.as_bytes()
    content = zstandard.compress(content) if packed_dictionary else content
    packer = zstandard.ZstdCompressor(dict_data=dictionary, write_checksum=True)
    parts = [b"\x5d\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content]
    parts += [packer.compress(record(url(n), text.encode())) for n, text in enumerate(TEXTS)]
    parts[2:2] = [b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"]  # another skippable frame holds nothing for us
    parts[5] = parts[5][:-9]
    items = read_parts(tmp_path, "warc.zst", parts)
    assert found(items) == without(3)
    assert [lost.rule for lost in losses(items)] == ["bad_record"]


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage(tmp_path, kind):
    """Whatever happens to some bytes: no exception, every record that was not touched, and a word about the others."""
    rng = random.Random(kind)
    for trial in range(200):
        parts = archive(kind)
        whole, spans = b"".join(parts), list(places(parts))
        at = rng.randrange(len(whole))
        n = rng.choice((1, 1, 20, 3000))
        damage = rng.choice(("flip", "cut", "insert", "delete", "overwrite"))
        if damage == "flip":
            first, last = at, at + 1
            broken = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
        elif damage == "cut":
            first, last = at, len(whole)
            broken = whole[:at]
        elif damage == "insert":
            first, last = at, at
            broken = whole[:at] + rng.randbytes(n) + whole[at:]
        else:
            first, last = at, min(at + n, len(whole))
            broken = whole[:at] + rng.randbytes(n if damage == "overwrite" else 0) + whole[last:]
        untouched = {k for k, (start, end) in enumerate(spans) if end <= first or start >= last}
        items = read_parts(tmp_path, kind, [broken])
        got = found(items)
        said = losses(items)
        where = (trial, damage, at, n)
        assert {url(k): TEXTS[k] for k in untouched}.items() <= got.items(), where
        if kind != "warc":  # a plain file has no checksums
            assert got.items() <= without().items(), where
        if len(got) < len(TEXTS) and any(start < first < end for start, end in spans):
            assert said, where
            assert sum(lost.n_bytes for lost in said) > 0 or said[-1].rule == UNREADABLE, where
        assert len({item.id for item in items}) == len(items), where


def test_a_file_that_cannot_be_read_does_not_end_the_others(tmp_path):
    (tmp_path / "a.warc").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.wet.zst").write_bytes(KINDS["warc.zst"](record(url(0), b"text")))
    lost, text = read(tmp_path)
    assert lost.rule == UNREADABLE
    assert text.text == "text"
