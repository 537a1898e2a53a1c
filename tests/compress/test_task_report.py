"""Figures on a task over seeds."""

import io
import statistics

import pytest
from rich.console import Console

from efftrain.compress.task.task_report import summary, task_table


def test_figures_have_mean_spread_and_values():
    found = summary([{"accuracy": 0.5, "bytes": 100}, {"accuracy": 0.7, "bytes": 100}])
    assert found["accuracy"]["values"] == [0.5, 0.7]
    assert found["accuracy"]["mean"] == pytest.approx(0.6)
    assert found["accuracy"]["sd"] == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert found["bytes"]["sd"] == 0
    assert summary([{"accuracy": 0.5}])["accuracy"]["sd"] == 0


def test_a_table_has_a_row_per_model_and_only_columns_with_figures():
    models = {"teacher": summary([{"accuracy": 0.5}, {"accuracy": 0.7}]), "probe": summary([{"bytes": 2000}] * 2)}
    out = io.StringIO()
    Console(file=out, width=120).print(task_table(models, (0, 1)))
    header, *rows = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert header == ["model", "accuracy", "bytes"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["teacher"] == ["0.600+-0.141", "-"]
    assert cells["probe"] == ["-", "2", "kB"] or cells["probe"][0] == "-"
    assert "over seeds 0, 1" in out.getvalue()
