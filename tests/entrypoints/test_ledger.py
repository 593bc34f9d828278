"""`lorry ledger`: which runs it takes, how it sorts, where it writes, and wrong use."""

import csv
import io
from pathlib import Path

import pytest

from stages.results.ledger_table import UNTESTED
from tests.conftest import Lorry
from tests.results.made_runs import (
    Page,
    make_run,
)


@pytest.fixture
def lorry(tmp_path: Path) -> Lorry:
    return Lorry(tmp_path / "data", tmp_path / "models", tmp_path / "runs", {"COLUMNS": "100"})


def test_the_command_sorts_writes_and_picks_runs(tmp_path: Path, lorry: Lorry) -> None:
    make_run(tmp_path, "one")
    make_run(tmp_path, "two", scores={"base": 1.0, "plain": 99.0})
    done = lorry("entrypoints.lorry", "ledger", "--sort", "score:desc", "--format", "csv")
    assert done.code == 0, done.output
    lines = list(csv.DictReader(io.StringIO(done.output)))
    assert [(line["run"], line["score"]) for line in lines] == [
        *(("two", "99.0"), ("one", "61.25"), ("one", "42.5"), ("one", "20.0"), ("two", "1.0"), ("two", UNTESTED))
    ]
    table = tmp_path / "ledger.csv"
    assert lorry("entrypoints.lorry", "ledger", "--sort", "score:desc", "--out", str(table)).lines == []
    assert table.read_bytes() == b"\xef\xbb\xbf" + done.output.encode(), "with the mark that spreadsheets want"
    out = tmp_path / "new" / "ledger.html"
    assert lorry("entrypoints.lorry", "ledger", "two", "--out", str(out)).lines == []
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "one" not in Page(out.read_text(encoding="utf-8")).cells
    assert "exact_match" in lorry("entrypoints.lorry", "ledger").output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sort", "scor"], "error: --sort scor: no column 'scor'; did you mean 'score'? columns: run, task, adapter"),
        (["--sort", "score:down"], "error: --sort score:down: unknown direction 'down'; write score or score:desc"),
        (["--sort", ""], "error: --sort : no column ''; columns: run"),
        (["--metric", "exact"], "error: --metric exact: no run is scored by it; did you mean 'exact_match'? metrics: "),
        (["jbo"], "no such run; did you mean 'job'? runs: job"),
        (["../runs/job"], "no such run; "),
        (["--out", "."], "error: --out .: cannot be written"),
    ],
)
def test_wrong_words_are_answered_in_one_line(tmp_path: Path, lorry: Lorry, arguments: list[str], told: str) -> None:
    make_run(tmp_path)
    done = lorry("entrypoints.lorry", "ledger", *arguments)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert told in done.output


def test_no_run_is_no_error(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "ledger")
    assert (done.code, done.lines) == (
        0,
        [f"{lorry.runs}: no run here; start one, or set LORRY_RUNS to another folder"],
    )


def test_nothing_is_written_into_the_runs(tmp_path: Path, lorry: Lorry) -> None:
    run = make_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    assert lorry("entrypoints.lorry", "ledger").code == 0
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before
