"""Does the work of `lorry status`: shows how far runs are, from manifests and events."""

import json
import time
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.contract.columns import wrap_text
from stages.contract.errors import Exit, UsageError
from stages.contract.events import duration_text, field_texts, read_last_start
from stages.contract.roots import Roots
from stages.host.needs import STAGES
from stages.host.outcome import Problem

INDENT = 13
"""Columns before a stage's state."""

FIGURES = ("loss", "tokens_per_second", "share_of_peak", "memory")
"""Figures of a progress event."""


def status_lines(run_name: str | None, width: int | None = None) -> Generator[str, None, None]:
    """Yield lines on the state of one run; None: of all runs. Raises UsageError if the named run does not exist.

    `width` is that of the terminal, in columns; None: nothing is wrapped.
    """
    folders = _run_folders(run_name)
    if not folders:
        yield Problem(_no_run_text())
    for folder in folders:
        yield folder.name
        for stage in STAGES:
            head = stage
            for text in _state_texts(stage_state(folder, stage), folder):
                yield from wrap_text(f"  {head:<{INDENT - 2}}{text}", width, INDENT)
                head = ""


def status_facts(run_name: str | None) -> list[dict[str, Any]]:
    """The facts behind `status_lines`, for JSON: an entry for each run. Raises UsageError if the named run does not
    exist."""
    return [
        {
            "run": folder.name,
            "folder": str(folder),
            "stages": {stage: stage_state(folder, stage) for stage in STAGES},
        }
        for folder in _run_folders(run_name)
    ]


def stage_state(folder: Path, stage: str) -> dict[str, Any]:
    """The state of a stage of the run in `folder`, as `work_state` has it, with `shards` (by their number: `done`,
    `running`, and the state of each that is not done) if it has shards and is not done itself."""
    state = work_state(folder / stage)
    shards = {} if state["state"] == "done" else _shard_states(folder, stage)
    return {**state, **({"shards": shards} if shards else {})}


def work_state(folder: Path) -> dict[str, Any]:
    """The state of the work in the folder of a stage or of a shard.

    `state` is `done`, `running`, `failed`, `interrupted` (exit code 75), `killed` (it ended without a word) or
    `not run`. If known, there are also: `seconds` and `end` (ISO 8601) of a finished stage, and its `counts`;
    `activity`, `step`, `total` and `unit` of the progress, with `loss`, `tokens_per_second`, `share_of_peak` (0..1),
    `memory` (bytes on one GPU) and `eta_seconds`; `error`, which names the cure, and `exit_code`; and `updated` (ISO
    8601), the time of the last event.
    """
    from stages.contract.run import is_held

    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return {
            "state": "done",
            **{key: manifest[key] for key in ("seconds", "end")},
            "counts": manifest.get("counts", {}),
        }
    except (OSError, ValueError, KeyError, TypeError):  # missing, damaged, or of another version
        events = read_last_start(folder / "events.jsonl")
    if is_held(folder):
        is_new = not events or events[-1]["event"] == "end"  # a start that still compares its inputs
        return {"state": "running", **({} if is_new else _progress(events))}
    return _ended_state(events, folder / "log.txt") if events else {"state": "not run"}


def _ended_state(events: list[dict[str, Any]], log: Path) -> dict[str, Any]:
    """The state of work that ended without a manifest, from the events of its last start."""
    found = _progress(events)
    found.pop("eta_seconds", None)
    ends = [event for event in events if event["event"] in ("stopped", "crashed")]
    if not ends:
        return {"state": "killed", **found}
    if ends[-1]["event"] == "crashed":
        error = f"{ends[-1].get('error')}; report this bug, with the traceback in {log}"
        return {"state": "failed", **found, "error": error, "exit_code": int(Exit.CRASHED)}
    code = ends[-1].get("exit_code")
    state = "interrupted" if code == Exit.INTERRUPTED else "failed"
    return {"state": state, **found, "error": str(ends[-1].get("error")), "exit_code": code}


def _progress(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest progress among a start's events, if there is any, with the newest loss of its activity, and `updated`.
    `eta_seconds` counts from now."""
    found: dict[str, Any] = {}
    for event in events:
        if event["event"] == "progress" and {"activity", "step", "total", "unit"} <= event.keys():
            loss = found.get("loss") if found.get("activity") == event["activity"] else None
            found = {key: event[key] for key in ("activity", "step", "total", "unit", *FIGURES) if key in event}
            if loss is not None:
                found.setdefault("loss", loss)
            if "eta_seconds" in event:
                found["eta_seconds"] = round(max(event["eta_seconds"] - (time.time() - event["time"]), 0), 1)
        elif event["event"] == "loss" and found:  # comes after the progress event of its step
            found["loss"] = event.get("loss")
    updated = datetime.fromtimestamp(events[-1]["time"], UTC)
    return {**found, "updated": updated.isoformat(timespec="milliseconds")}


def _state_texts(state: dict[str, Any], folder: Path) -> list[str]:
    """Lines on a stage's state, the first beside its name. `folder` is the run's."""
    texts = []
    for counts in state.get("shards", {}).values():
        running = f", {counts['running']} running" if counts["running"] else ""
        texts.append(f"{counts['done']} of {counts['count']} shards done{running}")
        for shard, own in counts["unfinished"].items():
            first, *more = _work_texts(own, folder)
            texts += [f"shard {shard} {first}", *more]
    if not texts or state["state"] != "not run":
        texts += _work_texts(state, folder)
    return texts


def _work_texts(state: dict[str, Any], folder: Path) -> list[str]:
    """Lines on the state of a stage or shard without its shards."""
    if state["state"] == "done":
        return [f"done, {state['seconds']:.0f} s, {state['end']}"]
    if state["state"] == "not run":
        return ["not run"]
    progress = ""
    if "step" in state:
        figures = field_texts({key: state.get(key) for key in FIGURES})
        eta = [f"{duration_text(state['eta_seconds'])} left"] if state.get("eta_seconds") else []  # 0: it takes longer
        progress = ", ".join([f"{state['activity']} {state['step']}/{state['total']} {state['unit']}", *figures, *eta])
    ago = ""
    if "updated" in state:
        ago = f" ({_age_text(time.time() - datetime.fromisoformat(state['updated']).timestamp())} ago)"
    if state["state"] == "running":
        return [f"running: {progress or 'no step yet'}{ago}"]
    code = f", exit code {state['exit_code']}" if state.get("exit_code") is not None else ""
    at = f" at {progress}" if progress else ""
    cure = f"`lorry run --run {folder.name}` resumes it"
    error = state["error"].splitlines() if "error" in state else [f"it ended without a word, as by a kill; {cure}"]
    return [f"{state['state']}{code}{at}{ago}", *error]


def _age_text(seconds: float) -> str:
    """A time in seconds since an event as text, such as `90 s`, `5 min`, `3 h` or `2 days`."""
    for limit, unit, text in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) / unit:.0f} {text}"
    return f"{seconds / 86_400:.0f} days"


def _shard_states(folder: Path, stage: str) -> dict[str, dict[str, Any]]:
    """The shards of a stage, by their number as text: `count`, `done`, `running`, and `unfinished`, the state of each
    shard that was started and is not done, by its name. Several entries if the stage was started with different
    numbers."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "shards" / stage).glob("*-of-*")):
        index, _, count = path.name.partition("-of-")
        counts = found.setdefault(count, {"count": int(count), "done": 0, "running": 0, "unfinished": {}})
        state = work_state(path)
        counts["done"] += state["state"] == "done"
        counts["running"] += state["state"] == "running"
        if state["state"] not in ("done", "not run"):
            counts["unfinished"][f"{index}/{count}"] = state
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def _run_folders(run_name: str | None) -> list[Path]:
    """The folder of the named run; None: those of all runs, sorted. Raises UsageError if the named run does not
    exist."""
    runs = Roots.from_environment().runs
    if run_name is None:
        return sorted(path.parent for path in runs.glob("*/recipe.yaml"))
    if not (runs / run_name / "recipe.yaml").is_file():
        raise UsageError(f"{runs / run_name}: no such run; `lorry status` lists all runs")
    return [runs / run_name]


def _no_run_text() -> str:
    """The line to print if there is no run."""
    return f"{Roots.from_environment().runs}: no run here; start one, or set LORRY_RUNS to another folder"
