"""How far runs are, from manifests and events."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from entrypoints.lorry import main
from stages.contract.errors import UsageError
from stages.contract.files import write_jsonl
from stages.contract.run import lock_stage_folder
from stages.host.outcome import Problem
from stages.host.status import status_lines
from tests.on_terminal import Terminal

START = {"event": "start", "key": "0" * 64, "starts": 1}
STEP = {"event": "progress", "activity": "train tuned", "step": 2, "total": 26, "unit": "steps", "eta_seconds": 90.0}
FIGURES = {"loss": 2.5, "tokens_per_second": 1234.5, "share_of_peak": 0.4567, "memory": 3 * 1024**3}
LOSS = {"event": "loss", "adapter": "tuned", "step": 2, "loss": 1.25}
END = {"event": "end"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has not been started. The clock stands still."""
    monkeypatch.setattr(time, "time", lambda: 1_767_323_045.25)
    monkeypatch.setenv("LORRY_RUNS", str(tmp_path))
    folder = tmp_path / "job"
    for stage in ("preprocess", "train"):
        (folder / stage).mkdir(parents=True)
    (folder / "recipe.yaml").write_text("")
    return folder


def happened(folder: Path, *events: dict[str, object]) -> None:
    """Write these events, all of them now unless they have a time."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "events.jsonl", [{"time": time.time(), **event} for event in events])


def facts(*arguments: str) -> Any:
    """What `lorry status --json` prints."""
    done = CliRunner().invoke(main, ["status", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_each_stage_has_a_line(run: Path) -> None:
    done = {"seconds": 61.4, "end": "2026-01-02T03:06:05+00:00"}
    (run / "preprocess" / "manifest.json").write_text(json.dumps(done))
    happened(run / "train", START, STEP)
    with lock_stage_folder(run / "train"):
        assert list(status_lines("job")) == [
            "job",
            "  preprocess done, 61 s, 2026-01-02T03:06:05+00:00",
            "  train      running: train tuned 2/26 steps, 1:30 left (0 s ago)",
            "  infer      not run",
            "  eval       not run",
        ]
    assert "  train      killed at train tuned 2/26 steps (0 s ago)" in status_lines(None)


def test_a_training_shows_steps_loss_speed_and_time_left(run: Path) -> None:
    happened(run / "train", START, {**STEP, **FIGURES}, LOSS)
    with lock_stage_folder(run / "train"):
        figures = "2/26 steps, loss 1.25, 1,234 tokens/s, 46% of peak, 3.0 GiB, 1:30 left"
        assert f"  train      running: train tuned {figures} (0 s ago)" in status_lines("job")
        (job,) = facts()
    assert (job["run"], job["folder"]) == ("job", str(run))
    assert list(job["stages"]) == ["preprocess", "train", "infer", "eval"]
    train = job["stages"]["train"]
    step = {key: STEP[key] for key in ("activity", "step", "total", "unit", "eta_seconds")}
    updated = "2026-01-02T03:04:05.250+00:00"
    assert train == {"state": "running", **step, **FIGURES, "loss": 1.25, "updated": updated}
    assert job["stages"]["infer"] == {"state": "not run"}


def test_the_time_left_counts_from_now(run: Path) -> None:
    happened(run / "train", START, {**STEP, "time": time.time() - 70})
    with lock_stage_folder(run / "train"):
        (job,) = facts("job")
        assert "  train      running: train tuned 2/26 steps, 0:20 left (70 s ago)" in status_lines("job")
    assert job["stages"]["train"]["eta_seconds"] == 20.0


@pytest.mark.parametrize(
    ("stage", "event", "shown"),
    [
        ("preprocess", {"activity": "render pages", "unit": "pages"}, "render pages 40/860 pages, 3:20 left"),
        (
            "infer",
            {"activity": "answer with tuned", "unit": "samples", "tokens_per_second": 55.5},
            "answer with tuned 40/860 samples, 56 tokens/s, 3:20 left",
        ),
    ],
)
def test_other_stages_show_what_they_count(run: Path, stage: str, event: dict[str, Any], shown: str) -> None:
    progress = {"event": "progress", "step": 40, "total": 860, "eta_seconds": 200.9, **event}
    happened(run / stage, START, progress, {"event": "decision", "what": "a", "value": 1, "why": "b"})
    with lock_stage_folder(run / stage):
        assert f"  {stage:<11}running: {shown} (0 s ago)" in status_lines("job")


def test_the_loss_of_another_adapter_is_not_shown(run: Path) -> None:
    happened(run / "train", START, STEP, LOSS, {**STEP, "activity": "train second"})
    with lock_stage_folder(run / "train"):
        assert "  train      running: train second 2/26 steps, 1:30 left (0 s ago)" in status_lines("job")


def test_a_stage_that_failed_says_why_and_what_to_do(run: Path) -> None:
    error = "few/questions.jsonl:3: no answer; add one"
    happened(run / "train", START, STEP, {"event": "stopped", "error": error, "exit_code": 3}, END)
    lines = list(status_lines("job"))
    place = lines.index("  train      failed, exit code 3 at train tuned 2/26 steps (0 s ago)")
    assert lines[place + 1] == f"             {error}"
    train = facts()[0]["stages"]["train"]
    assert (train["state"], train["error"], train["exit_code"], train["step"]) == ("failed", error, 3, 2)
    assert "eta_seconds" not in train


def test_each_mistake_of_an_error_has_its_line(run: Path) -> None:
    error = "train.epochs 0: must be 1 or more; raise it\nmodel.path x: no such folder; name another"
    happened(run / "train", START, {"event": "stopped", "error": error, "exit_code": 2}, END)
    lines = list(status_lines("job"))
    place = lines.index("  train      failed, exit code 2 (0 s ago)")
    assert lines[place + 1 : place + 3] == [f"{' ' * 13}{line}" for line in error.splitlines()]


def test_an_interrupted_stage_says_so(run: Path) -> None:
    error = "stopped by SIGTERM after saving finished work; run the same command again"
    happened(run / "train", START, STEP, {"event": "stopped", "error": error, "exit_code": 75}, END)
    lines = list(status_lines("job"))
    place = lines.index("  train      interrupted, exit code 75 at train tuned 2/26 steps (0 s ago)")
    assert lines[place + 1] == f"             {error}"


def test_a_crash_names_the_log(run: Path) -> None:
    happened(run / "train", START, {"event": "crashed", "error": "KeyError('x')"}, END)
    cure = f"report this bug, with the traceback in {run / 'train' / 'log.txt'}"
    assert f"             KeyError('x'); {cure}" in status_lines("job")


def test_a_killed_stage_says_how_to_resume_it(run: Path) -> None:
    happened(run / "train", START, STEP)
    lines = list(status_lines("job"))
    place = lines.index("  train      killed at train tuned 2/26 steps (0 s ago)")
    assert lines[place + 1] == ("             it ended without a word, as by a kill; `lorry run --run job` resumes it")


def test_a_new_start_does_not_show_the_end_of_the_last(run: Path) -> None:
    failed = (START, STEP, {"event": "stopped", "error": "x; y", "exit_code": 3}, END)
    happened(run / "train", *failed)
    with lock_stage_folder(run / "train"):
        assert "  train      running: no step yet" in status_lines("job"), "it compares its inputs"
    happened(run / "train", *failed, START)
    with lock_stage_folder(run / "train"):
        assert "  train      running: no step yet (0 s ago)" in status_lines("job")


def test_shards_that_run_or_failed_have_lines(run: Path) -> None:
    shards = run / "shards" / "infer"
    for index in range(3):
        (shards / f"{index}-of-3").mkdir(parents=True)
    (shards / "0-of-3" / "manifest.json").write_text(json.dumps({"seconds": 1.0, "end": "2026-01-02T03:06:05+00:00"}))
    asked = {**STEP, "activity": "answer with base", "unit": "samples"}
    happened(shards / "1-of-3", START, asked)
    happened(shards / "2-of-3", START, {"event": "stopped", "error": "no; try", "exit_code": 4}, END)
    with lock_stage_folder(shards / "1-of-3"):
        lines = list(status_lines("job"))
        infer = facts()[0]["stages"]["infer"]
    place = lines.index("  infer      1 of 3 shards done, 1 running")
    assert lines[place + 1 : place + 4] == [
        "             shard 1/3 running: answer with base 2/26 samples, 1:30 left (0 s ago)",
        "             shard 2/3 failed, exit code 4 (0 s ago)",
        "             no; try",
    ]
    assert lines[place + 4] == "  eval       not run"
    assert infer["shards"]["3"]["done"] == 1 and infer["shards"]["3"]["unfinished"]["2/3"]["exit_code"] == 4


@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_fit_the_terminal_and_paths_stay_whole(run: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/data/一个很长的文件名/patents.pdf"
    happened(run / "train", START, {**STEP, **FIGURES, "activity": "train 适配器名字"}, LOSS)
    error = f"{path}: not a PDF, or one that is encrypted or damaged beyond repair; repair it or take it away"
    happened(run / "preprocess", START, {"event": "stopped", "error": error, "exit_code": 3}, END)
    terminal = Terminal(width)
    with lock_stage_folder(run / "train"), terminal.open() as screen, pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "stdout", screen)
        main(["status", "job"])
    lines = terminal.close().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert any(path in line for line in lines)
    assert all(line.startswith((" " * 13, "  train", "  pre", "  infer", "  eval", "job")) for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "2/26 steps, loss 1.25, 1,234 tokens/s, 46% of peak, 3.0 GiB, 1:30 left" in text and error in text


def test_no_run_is_no_error_but_a_wrong_name_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="none: no such run"):
        list(status_lines("none"))
    monkeypatch.setenv("LORRY_RUNS", str(run / "train"))
    assert list(status_lines(None)) == [
        Problem(f"{run / 'train'}: no run here; start one, or set LORRY_RUNS to another folder")
    ]
    assert facts() == []
