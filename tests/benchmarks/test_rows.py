"""Rows of the benchmarks for GPUs: parts that are measured apart stay together."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import rows, two_gpus
from benchmarks.memory import SETTINGS
from benchmarks.one_gpu import PrecisionTraining
from benchmarks.rows import write_rows
from stages.hardware.memory import Lengths
from stages.hardware.step import StepPlan


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    return tmp_path / "x.json"


def read(results: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(results.read_text())["rows"]
    return found


def test_a_part_measured_again_replaces_its_own_rows_alone(results: Path) -> None:
    first = {"measured": "2026-01-02", "machine": {"gpus": ["H200", "H200"]}, "notes": ["a note"]}
    old = [{"part": "a", "n": 1}, {"part": "b", "n": 2}, {"part": "b", "n": 3}, {"part": "c", "n": 4}]
    results.write_text(json.dumps({**first, "rows": old}))
    write_rows("x", [{"part": "b", "n": 9}, {"part": "c", "not run": "two GPUs, and one here"}], "again", by="part")
    where = {"measured on": "2026-01-02, H200, H200"}
    assert read(results) == [{**where, "part": "a", "n": 1}, {**where, "part": "c", "n": 4}, {"part": "b", "n": 9}]
    value = json.loads(results.read_text())
    assert (value["command"], value["notes"]) == ("again", ["a note"])
    write_rows("x", [{"part": "a", "n": 5}], "once more", by="part")
    assert read(results)[0] == {**where, "part": "c", "n": 4}, "it keeps the day of its measurement"
    write_rows("x", [{"n": 1}], "all again")
    assert read(results) == [{"n": 1}]
    assert "notes" not in json.loads(results.read_text())


def test_a_setting_that_never_ran_is_a_row_too(results: Path) -> None:
    row = {"setting": "s", "not run": "2 GPUs, and 1 here"}
    write_rows("x", [row], "first", by="setting")
    write_rows("x", [row], "second", by="setting")
    assert read(results) == [row]


def test_the_committed_rows_say_which_part_they_are_of() -> None:
    for name, by in (("two_gpus", "part"), ("one_gpu", "part"), ("training", "setting")):
        assert all(by in row for row in read(rows.RESULTS / f"{name}.json")), name


def test_a_row_of_precision_has_its_losses_when_it_is_first_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n')
    (tmp_path / "log.txt").write_text("Attempting to unscale FP16 gradients\n")
    training = PrecisionTraining.__new__(PrecisionTraining)
    training.folder, training.events, training.earlier = tmp_path, tmp_path / "events.jsonl", 0
    training.row, training.began = {"what": "float16"}, 0.0
    training.process = SimpleNamespace(communicate=lambda timeout: ("train: done", None), returncode=0)  # type: ignore[assignment]
    monkeypatch.setattr(two_gpus, "rows", [])
    training.finish(alone=False)
    (row,) = two_gpus.rows
    found = [row[name] for name in ("steps", "all losses finite", "unscale errors in the log")]
    assert found == [2, False, 1]


def test_one_setting_has_samples_of_mixed_lengths_in_a_pass() -> None:
    mixed = next(one for one in SETTINGS if "mixed lengths" in one.name)
    assert [mixed.sample_length(sample) for sample in range(3)] == [2048, 648, 2048]
    assert mixed.lengths == Lengths(2048, 512, 1348.0, 700.0)
    alike = next(one for one in SETTINGS if one.name == "7B, 4 x 2048")
    step = StepPlan(4, 1, 16_384)
    assert (alike.lengths.largest_pass(step), mixed.lengths.largest_pass(step)) == (4 * 2048, 4 * 2048)
    assert len({one.name for one in SETTINGS}) == len(SETTINGS)
