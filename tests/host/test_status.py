"""How far runs are, from manifests and events."""

import json
import time
from pathlib import Path

import pytest

from stages.contract.errors import UsageError
from stages.contract.files import write_jsonl
from stages.contract.run import lock_stage_folder
from stages.host.outcome import Problem
from stages.host.status import status_lines

STEP = {"event": "progress", "activity": "train tuned", "step": 2, "total": 26, "unit": "steps", "eta_seconds": 90.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has not been started."""
    monkeypatch.setenv("LORRY_RUNS", str(tmp_path))
    folder = tmp_path / "job"
    for stage in ("preprocess", "train"):
        (folder / stage).mkdir(parents=True)
    (folder / "recipe.yaml").write_text("")
    return folder


def happened(folder: Path, *events: dict[str, object]) -> None:
    write_jsonl(folder / "events.jsonl", [{"time": time.time(), **event} for event in events])


def test_each_stage_has_a_line(run: Path) -> None:
    done = {"seconds": 61.4, "end": "2026-01-02T03:06:05+00:00"}
    (run / "preprocess" / "manifest.json").write_text(json.dumps(done))
    happened(run / "train", STEP)
    with lock_stage_folder(run / "train"):
        assert list(status_lines("job")) == [
            "job",
            "  preprocess done, 61 s, 2026-01-02T03:06:05+00:00",
            "  train      running: train tuned 2/26 steps, 90 s left (0 s ago)",
            "  infer      not run",
            "  eval       not run",
        ]
    assert "  train      stopped, half done: train tuned 2/26 steps (0 s ago)" in status_lines(None)


def test_a_stage_that_stopped_says_why(run: Path) -> None:
    happened(run / "train", STEP, {"event": "stopped", "error": "stopped by SIGTERM", "exit_code": 75})
    assert "  train      stopped, half done: stopped by SIGTERM (0 s ago)" in status_lines("job")


def test_a_stage_that_ended_without_a_manifest_is_half_done(run: Path) -> None:
    happened(run / "train", STEP, {"event": "end"})
    assert "  train      stopped, half done (0 s ago)" in status_lines("job")


def test_no_run_is_no_error_but_a_wrong_name_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="none: no such run"):
        list(status_lines("none"))
    monkeypatch.setenv("LORRY_RUNS", str(run / "train"))
    assert list(status_lines(None)) == [
        Problem(f"{run / 'train'}: no run here; start one, or set LORRY_RUNS to another folder")
    ]
