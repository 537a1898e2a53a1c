"""A figure cannot claim what it is not, and a scorecard survives the disk and reads on a terminal."""

import io
import json
import os

import pytest
from rich.console import Console

from efftrain.errors import RunError
from efftrain.measure.scorecard.scorecard import Figure, Scorecard, not_measured, show, table

FIGURES = {
    "bpb": Figure(1.41234, "bits/byte", "measured", "held-out rows"),
    "parameters_active": Figure(813_000, "parameters", "counted"),
    "train_energy": not_measured("J", "needs a power meter"),
}
CARD = Scorecard("dense", FIGURES, {"cpu": "a test", "packages": {"jax": "0.10"}})


@pytest.mark.parametrize(
    ("value", "method"),
    [(None, "measured"), (None, "counted"), (None, "modelled"), (1.0, "unavailable"), (0.0, "unavailable")],
)
def test_a_value_and_unavailable_exclude_each_other(value, method):
    with pytest.raises(ValueError, match=f"cannot have the method {method}"):
        Figure(value, "s", method)


def test_what_is_no_number_is_no_figure():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="is not finite"):
            Figure(value, "bits/byte", "measured")
    with pytest.raises(ValueError, match="method of a figure is 'guessed'"):
        Figure(1.0, "s", "guessed")


def test_round_trip(tmp_path):
    path = tmp_path / "scorecard.json"
    CARD.write(path)
    assert Scorecard.read(path) == CARD
    assert json.loads(path.read_text())["figures"]["train_energy"] == {
        "value": None,
        "unit": "J",
        "method": "unavailable",
        "note": "needs a power meter",
        "split": "",
    }
    assert os.listdir(tmp_path) == ["scorecard.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scorecard.json"
    CARD.write(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"cannot write .*scorecard\.json \(No space left on device\)"):
        Scorecard("other", {}, {}).write(path)
    assert Scorecard.read(path) == CARD
    assert os.listdir(tmp_path) == ["scorecard.json"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"name": "x"}',
        '{"name": "x", "environment": {}, "figures": {"bpb": {"value": 1}}}',
        '{"name": "x", "environment": {}, "figures": {"bpb": {"value": null, "unit": "s", "method": "measured"}}}',
    ],
)
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "scorecard.json"
    path.write_text(text)
    with pytest.raises(RunError, match=r"scorecard\.json is not a scorecard"):
        Scorecard.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RunError, match="there is no scorecard"):
        Scorecard.read(tmp_path / "scorecard.json")


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0123, "s", "12.3 ms"),
        (25.94e-6, "s/token", "25.9 µs/token"),
        (4321, "s", "4,321 s"),
        (4.92e6, "B", "4.92 MB"),
        (999.7e3, "B", "1 MB"),
        (836e9, "FLOP", "836 GFLOP"),
        (295_040, "FLOP/token", "295 kFLOP/token"),
        (813_000, "parameters", "813k parameters"),
        (12_345, "tokens/s", "12.3k tokens/s"),
        (1.41234, "bits/byte", "1.4123 bits/byte"),
        (0.0081, "share", "0.8%"),
        (0, "B", "0 B"),
    ],
)
def test_figures_read_well(value, unit, shown):
    assert show(Figure(value, unit, "measured")) == shown


def printed(renderable) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_table_of_one_model():
    text = printed(table([CARD]))
    bpb, parameters, energy = (next(line for line in text.splitlines() if name in line) for name in FIGURES)
    assert "1.4123 bits/byte" in bpb
    assert "measured" in bpb
    assert "held-out rows" in bpb
    assert "813k parameters" in parameters
    assert "counted" in parameters
    assert "not measured" in energy
    assert "needs a power meter" in energy


def test_table_of_several_models():
    """A row for each; a method that differs between models stands with the value, one that does not in the heading."""
    other = Scorecard("moe", FIGURES | {"bpb": Figure(1.3, "bits/byte", "modelled")}, {})
    third = Scorecard("bare", {}, {})
    text = printed(table([CARD, other, third], figures=["bpb", "parameters_active", "train_energy", "unknown"]))
    lines = text.splitlines()
    heading = "\n".join(lines[: next(i for i, line in enumerate(lines) if "──" in line)])
    assert all(word in heading for word in ("bpb", "bits/byte", "parameters", "counted", "train energy", "J"))
    assert "measured" not in heading
    assert "unknown" not in text
    dense, moe, bare = (
        next(i for i, line in enumerate(lines) if line.split()[:1] == [n]) for n in ("dense", "moe", "bare")
    )
    assert lines[dense].split()[1:] == ["1.4123", "813k", "not", "measured"]
    assert lines[dense + 1].split() == ["measured"]
    assert lines[moe].split()[1:3] == ["1.3000", "813k"]
    assert lines[moe + 1].split() == ["modelled"]
    assert lines[bare].split()[1:] == ["-", "-", "-"]
    assert "train_energy: not measured, needs a power meter" in text


def test_all_headline_figures_fit_on_100_columns():
    units = {
        "bpb": ("bits/byte", 1.41),
        "parameters_active": ("parameters", 124e6),
        "parameter_bytes": ("B", 498e6),
        "train_flops": ("FLOP", 8.36e18),
        "decode_flops_per_token": ("FLOP/token", 295e6),
        "decode_s_per_token_b1": ("s/token", 25.9e-6),
        "peak_memory_bytes": ("B", 424e6),
    }
    figures = {name: Figure(value, unit, "measured") for name, (unit, value) in units.items()}
    text = printed(table([Scorecard(name, figures, {}) for name in ("dense", "moe-8x2-distilled")]))
    for shown in ("1.4100", "124M", "498 MB", "8.36 EFLOP", "295 MFLOP", "25.9 µs", "424 MB"):
        assert text.count(shown) == 2
    assert "…" not in text


def test_the_table_of_a_run_fits_80_columns_with_every_name_and_value_whole():
    """The longest names and values that ``score`` makes."""
    figures = {
        "decode_energy_per_token": not_measured("J/token", "this version has no command that measures it"),
        "decode_flops_per_token": Figure(1.234e9, "FLOP/token", "counted", "behind a context of 128"),
        "train_flops_per_token": Figure(6.06e11, "FLOP/token", "counted", "rows of 128, forward and backward, causal"),
        "parameters_active": Figure(813_000, "parameters", "counted", "used by one token"),
        "loss": Figure(3.74671, "nats/token", "measured", "validation split"),
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table([Scorecard("quickstart", figures, {})]))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    for name, figure in figures.items():
        assert any(line.strip().startswith(name) and show(figure) in line for line in lines), name
