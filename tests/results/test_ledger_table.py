"""The ledger as CSV and as a table."""

import csv
import io
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given

from stages.results.ledger import Row
from stages.results.ledger_page import as_html
from stages.results.ledger_table import RARE_COLUMNS, UNTESTED, as_csv, as_table
from tests.results.made_runs import (
    ROWS,
    Page,
    make_run,
    rows_of,
)


@given(rows=ROWS)
def test_csv_comes_back_as_it_was_and_holds_no_formula(rows: list[Row]) -> None:
    head, *lines = csv.reader(io.StringIO(as_csv(rows), newline=""))
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
    (line,) = csv.DictReader(io.StringIO(as_csv([Row("=1+1", state="@SUM(A1)", data_mix="-x", gain=-2.5)])))
    assert (line["run"], line["state"], line["data_mix"], line["gain"]) == ("'=1+1", "'@SUM(A1)", "'-x", "-2.5")


def test_untested_is_a_word_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(run.stage_folder("eval"))
    rows = rows_of(tmp_path)
    assert [line["score"] for line in csv.DictReader(io.StringIO(as_csv(rows)))] == [UNTESTED] * 3
    assert Page(as_html(rows, None, False)).cells.count(UNTESTED) == 3
    assert as_table(rows, None, False).count(UNTESTED) == 3


@pytest.mark.parametrize("width", [80, 120, 250])
def test_the_table_has_what_fits(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    make_run(tmp_path)
    rows = [*rows_of(tmp_path), Row("折叠" * 30, adapter="x", state="broken: " + "much " * 40)]
    text = as_table(rows, "seed", False)
    assert max(map(len, text.splitlines())) <= width
    assert "61.2 [51.2, 71.2]" in text
    assert "seed" in text.splitlines()[1]  # sorted by, and so shown
    head = text.splitlines()[1]
    if width == 80:
        assert "no room for: " in text
    if width == 250:
        assert "over base" in head
        assert "failed" in head
