"""Whatever happened to metrics.jsonl: every good row stays, the run goes on, and the user is told what was lost."""

import json
from pathlib import Path

import pytest
import tiny

from efftrain.train.metrics.metrics_log import MetricsLog, read_metrics

N_ROWS = 20


def row(step: int, split: str = "train", **values: float) -> bytes:
    return json.dumps({"step": step, "split": split, "loss": float(step)} | values).encode() + b"\n"


WHOLE = [row(step) for step in range(1, N_ROWS + 1)]
HALF = WHOLE[9][:20]  # of step 10, without an end of line

# name -> (content, steps that are left, words about what was lost)
DAMAGES: dict[str, tuple[bytes, set[int], str]] = {
    "a line cut in the middle": (
        b"".join([*WHOLE[:9], HALF, b"\n", *WHOLE[10:]]), {10}, "1 line cannot be read, no row is left of step 10"
    ),
    "a line cut in the middle, and the next one right after it": (
        b"".join([*WHOLE[:9], HALF, *WHOLE[10:]]), {10}, "1 line cannot be read, no row is left of step 10"
    ),
    "two rows in one line": (b"".join([*WHOLE[:9], WHOLE[9][:-1], *WHOLE[10:]]), set(), ""),
    "invalid UTF-8": (b"".join([*WHOLE[:4], b"\xff\xfe\n", *WHOLE[4:]]), set(), "1 line cannot be read"),
    "zeros after a loss of power": (b"".join([*WHOLE[:4], bytes(100), *WHOLE[4:]]), set(), "1 line cannot be read"),
    "JSON that is no row": (b"".join([b"123\n", *WHOLE, b'[1]\n"x"\n']), set(), "3 lines cannot be read"),
    "rows without a step or with none that counts": (
        b"".join([*WHOLE, b'{"split": "train"}\n{"step": "7", "split": "train"}\n{"step": true, "split": "train"}\n']),
        set(),
        "3 lines cannot be read",
    ),
    "a row without its split": (b"".join([*WHOLE, b'{"step": 3}\n']), set(), "1 line cannot be read"),
    "deep nesting": (b"".join([b"[" * 100_000, b"\n", *WHOLE]), set(), "1 line cannot be read"),
    "an end that is missing": (b"".join(WHOLE[:15]), set(range(16, 21)), "no row is left of 5 steps from 16 to 20"),
}  # fmt: skip


def continued(directory: Path) -> list[tuple[int, float]]:
    log = MetricsLog(directory, after_step=N_ROWS)
    log.write(N_ROWS + 1, {"loss": N_ROWS + 1.0})
    log.close()
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"]
    return [(row["step"], row["loss"]) for row in read_metrics(directory)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_good_row_stays_and_the_loss_is_told(tmp_path, capfd, damage):
    content, lost, words = DAMAGES[damage]
    (tmp_path / "metrics.jsonl").write_bytes(content)
    want = [(step, float(step)) for step in range(1, N_ROWS + 2) if step not in lost]
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == want[:-1]
    capfd.readouterr()
    assert continued(tmp_path) == want
    said = " ".join(capfd.readouterr().err.split())
    assert words in said
    assert bool(words) == ("is damaged" in said)
    copies = list(tmp_path.glob("*damaged*"))
    assert [copy.read_bytes() for copy in copies] == ([content] if "cannot be read" in words else [])
    assert all(str(copy) in said for copy in copies)


def test_of_two_rows_of_a_step_the_newer_stays_and_rows_come_in_order(tmp_path, capfd):
    """Two processes that wrote at once."""
    validation = row(10, "validation", bpb=2.0)
    content = b"".join([*WHOLE[:10], validation, *WHOLE[15:], row(4, loss=44.0), *WHOLE[10:15], row(21, loss=9.0)])
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert continued(tmp_path) == [(step, 44.0 if step == 4 else float(step)) for step in range(1, N_ROWS + 2)]
    assert [row["bpb"] for row in read_metrics(tmp_path, "validation")] == [2.0]
    assert "1 line replaced by a newer row of the same step" in " ".join(capfd.readouterr().err.split())
    (copy,) = tmp_path.glob("metrics.jsonl.damaged-*")
    assert copy.read_bytes() == content
    continued(tmp_path)
    assert list(tmp_path.glob("metrics.jsonl.damaged-*")) == [copy]  # the file is whole now


def test_what_a_kill_leaves_is_no_damage(tmp_path, capfd):
    """Rows after the checkpoint, the last of them half a row; a resumed run begins at a later step."""
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*WHOLE[4:], row(21), row(22)[:9]]))
    assert [step for step, _ in continued(tmp_path)] == list(range(5, 22))
    assert "damaged" not in capfd.readouterr().err
    assert not list(tmp_path.glob("*damaged*"))


def test_a_run_with_damaged_metrics_goes_on(crashed, ends_like):
    path = crashed / "metrics.jsonl"
    path.write_bytes(b"\xff\n123\n" + path.read_bytes() + b"\n{}\n")
    ends_like(crashed, tiny.train(crashed))
