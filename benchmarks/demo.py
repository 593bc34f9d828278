"""`make demo` without an earlier run: seconds, peak memory, seconds of each stage, scores, and a second `make demo`.

    python -m benchmarks.demo

Deletes runs/demo first. Memory is the proportional set size of all processes of the run together, sampled five times a
second.
"""

import json
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.rows import write_rows

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "demo"


def time_command(command: list[str]) -> tuple[float, float]:
    """Run a command. Returns its wall seconds, and the peak memory of all its processes together in GiB.

    Memory is the proportional set size, sampled every 0.2 s. Raises AssertionError if the command fails.
    """
    before = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    peak = 0.0
    ended = threading.Event()

    def poll_memory() -> None:
        """Update the peak memory every 0.2 s until the command has ended."""
        nonlocal peak
        root = psutil.Process(process.pid)
        while not ended.wait(0.2):
            total = 0
            for one in [root, *root.children(recursive=True)]:
                try:
                    total += one.memory_full_info().pss
                except psutil.Error:
                    continue
            peak = max(peak, total / 2**30)

    watcher = threading.Thread(target=poll_memory, daemon=True)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - before
    ended.set()
    assert code == 0, f"{command} exited {code}"
    return seconds, peak


def stage_rows() -> list[dict[str, Any]]:
    """Return a row for each stage of the demo's run, with the seconds and counts from the stage's manifest."""
    rows = []
    for stage in ("preprocess", "train", "infer", "eval"):
        manifest = json.loads((RUN / stage / "manifest.json").read_text())
        rows.append({"what": stage, "seconds": manifest["seconds"], "counts": manifest["counts"]})
    return rows


if __name__ == "__main__":
    shutil.rmtree(RUN, ignore_errors=True)
    seconds, peak = time_command(["make", "demo"])
    again, _ = time_command(["make", "demo"])
    scores = json.loads((RUN / "eval" / "scores.json").read_text())
    rows: list[dict[str, Any]] = [
        {"what": "make demo", "seconds": round(seconds, 1), "peak memory GiB": round(peak, 2)},
        {"what": "make demo again", "seconds": round(again, 2)},
        *stage_rows(),
        *({"what": f"scores of {model}", **metrics} for model, metrics in scores.items()),
    ]
    write_rows("demo", rows, "python -m benchmarks.demo")
