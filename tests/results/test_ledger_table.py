"""The ledger as CSV and as a table."""

import csv
import io
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given

from stages.results.ledger import Row
from stages.results.ledger_page import render_html
from stages.results.ledger_table import RARE_COLUMNS, UNTESTED, render_csv, render_table
from tests.results.made_runs import (
    ROWS,
    Page,
    make_run,
    rows_of,
)


@given(rows=ROWS)
def test_csv_comes_back_as_it_was_and_holds_no_formula(rows: list[Row]) -> None:
    head, *lines = csv.reader(io.StringIO(render_csv(rows), newline=""))
    assert head == [field.name for field in fields(Row) if field.name not in RARE_COLUMNS]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        for name, cell in zip(head, line, strict=True):
            value = getattr(row, name)
            if isinstance(value, str):
                assert cell in (value, f"'{value}")
                assert not cell.startswith(tuple("=+-@＝＋－＠"))
            elif value is None:
                assert cell == (UNTESTED if name == "score" else "")
            else:
                assert float(cell) == value


def test_a_formula_is_a_text_and_a_negative_number_a_number() -> None:
    (line,) = csv.DictReader(io.StringIO(render_csv([Row("=1+1", state="@SUM(A1)", data_mix="-x", gain=-2.5)])))
    assert (line["run"], line["state"], line["data_mix"], line["gain"]) == ("'=1+1", "'@SUM(A1)", "'-x", "-2.5")


def test_untested_is_a_word_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(run.stage_folder("eval"))
    rows = rows_of(tmp_path)
    assert [line["score"] for line in csv.DictReader(io.StringIO(render_csv(rows)))] == [UNTESTED] * 3
    assert Page(render_html(rows, None, False)).cells.count(UNTESTED) == 3
    assert render_table(rows, None, False).count(UNTESTED) == 3


@pytest.mark.parametrize("width", [80, 120, 250])
def test_the_table_has_what_fits(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    make_run(tmp_path)
    rows = [*rows_of(tmp_path), Row("折叠" * 30, adapter="x", state="broken: " + "much " * 40)]
    text = render_table(rows, "seed", False)
    assert max(map(len, text.splitlines())) <= width
    assert "61.2 [51.2, 71.2]" in text
    assert "seed" in text.splitlines()[1]  # sorted by, and so shown
    head = text.splitlines()[1]
    if width == 80:
        assert "no room for: " in text
    if width == 250:
        assert "+41.2 [+31.2, +51.2]*" in text
        assert "*: the 95% interval excludes 0, also after Holm's correction for 2 models of a run" in text
        assert "over base" in head
        assert "failed" in head


def test_few_documents_and_older_intervals_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    row = Row("", adapter="base", metric="f1", score=50.0, low=20.0, high=80.0)
    rows = [replace(row, run=run, groups=groups) for run, groups in (("a", 5), ("b", 40), ("c", 5), ("e", None))]
    rows.append(replace(row, run="d", low=None, high=None, groups=3))
    notes = [
        "a, c: 5 documents: intervals are rough",
        "d: 3 documents: too few for an interval, at least 5 are needed",
        "e: intervals by the resampling of eval.bootstrap, too narrow with few documents; run eval again",
    ]
    table = render_table(rows, None, False)
    assert table.splitlines()[-3:] == notes
    assert "50.0 [too few]" in table
    assert "documents" in table.splitlines()[1]
    page = render_html(rows, None, False)
    assert all(f"<p>{note}</p>" in page for note in notes)
