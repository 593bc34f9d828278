"""Does the work of `lorry status`: shows how far runs are, from manifests and events."""

import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.events import read_last_event
from stages.contract.roots import Roots
from stages.host.needs import STAGES
from stages.host.outcome import Problem


def status_lines(run_name: str | None) -> Generator[str, None, None]:
    """Yield lines on the state of one run; None: of all runs. Raises UsageError if the named run does not exist."""
    runs = Roots.from_environment().runs
    folders = [runs / run_name] if run_name else sorted(path.parent for path in runs.glob("*/recipe.yaml"))
    if run_name and not (folders[0] / "recipe.yaml").is_file():
        raise UsageError(f"{folders[0]}: no such run; `lorry status` lists all runs")
    if not folders:
        yield Problem(f"{runs}: no run here; start one, or set LORRY_RUNS to another folder")
    for folder in folders:
        yield folder.name
        for stage in STAGES:
            yield from (f"  {stage:<11}{state}" for state in _state_lines(folder, stage))


def _state_lines(folder: Path, stage: str) -> list[str]:
    """Lines on the state of a stage, and on its shards if there are any and the stage itself is not done."""
    from stages.contract.run import is_held

    try:
        manifest = json.loads((folder / stage / "manifest.json").read_text())
        return [f"done, {manifest['seconds']:.0f} s, {manifest['end']}"]
    except (OSError, ValueError, KeyError, TypeError):  # missing, damaged, or of another version
        last = read_last_event(folder / stage / "events.jsonl")
    shards = _shard_counts(folder, stage)
    if last is None:
        return [shards or "not run"]
    state = "running" if is_held(folder / stage) else "stopped, half done"
    ago = f"{max(time.time() - last['time'], 0):.0f} s ago"
    return [*([shards] if shards else []), f"{state}{_event_text(last, state == 'running')} ({ago})"]


def _event_text(event: dict[str, Any], running: bool) -> str:
    """An event of events.jsonl as text that begins with a colon; empty for the event `end`.

    The time left is in the text only if `running`.
    """
    if event["event"] == "end":
        return ""
    if event["event"] != "progress":
        return f": {event.get('error', event['event'])}"
    eta = f", {event['eta_seconds']:.0f} s left" if "eta_seconds" in event and running else ""
    speed = f", {event['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in event else ""
    memory = f", {event['memory'] / 1024**3:.1f} GiB" if "memory" in event else ""
    return f": {event['activity']} {event['step']}/{event['total']} {event['unit']}{speed}{memory}{eta}"


def _shard_counts(folder: Path, stage: str) -> str:
    """Text on how many shards of a stage are done and how many run; empty without shards.

    If a stage was started with different numbers of shards, the text has each of these numbers.
    """
    from stages.contract.run import is_held

    counts: dict[int, list[Path]] = {}
    for shard in (folder / "shards" / stage).glob("*-of-*"):
        counts.setdefault(int(shard.name.partition("-of-")[2]), []).append(shard)
    states = []
    for count, shards in sorted(counts.items()):
        done = sum((shard / "manifest.json").is_file() for shard in shards)
        running = sum(is_held(shard) for shard in shards)
        states.append(f"{done} of {count} shards done" + (f", {running} running" if running else ""))
    return "; ".join(states)
