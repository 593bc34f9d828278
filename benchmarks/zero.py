"""Training with ZeRO-3 against training without: losses, and resuming with other sharding or GPU counts.

    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.zero [PART...]

Needs two GPUs, DeepSpeed, SmolLM2's tokenizer, and a run `prepared` (see `benchmarks.two_gpus`). The train command runs
in processes of its own, several at a time, so their speeds mean nothing. Nothing is asserted: the rows say what
happened.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.rows import write_rows
from benchmarks.two_gpus import RANDOM_LLAMA, ROOTS, Training, add_differences, make_model_in_a_process, rows
from stages.contract.files import read_json, read_jsonl

SETTINGS = (
    *("model.path=random-llama", "train.target_modules=[all-linear]", "train.epochs=8"),
    *("train.lora_plus_ratio=4", "train.checkpoint_every=1000"),
)
HALF = (*SETTINGS, "train.precision=float16")
STOPS = (20, 50)
ONCE = max(2, (os.cpu_count() or 2) * 3 // 8)
"""Number of trainings at a time."""


class Start(Training):
    """One start of the train command with a given sharding and number of processes, each on a GPU of its own."""

    def __init__(
        self, run: str, sharding: str, processes: int, settings: tuple[str, ...] = SETTINGS, **environment: str
    ) -> None:
        self.run, self.folder, self.began = run, ROOTS.runs / run / "train", time.monotonic()
        if not self.folder.is_dir():
            shutil.copytree(ROOTS.runs / "prepared" / "preprocess", ROOTS.runs / run / "preprocess")
        self.row: dict[str, Any] = {"what": f"{sharding}, {processes} process(es)", "run": run, **environment}
        self.events = self.folder / "events.jsonl"
        self.earlier = len(read_jsonl(self.events)) if self.events.is_file() else 0
        gpus = ",".join(map(str, range(processes)))
        sets = [word for setting in (*settings, f"train.sharding={sharding}") for word in ("--set", setting)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "entrypoints.train", "patent-qa", "--profile", "tiny", "--run", run, *sets],
            env={**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpus, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, alone: bool = False) -> "Start":
        """Wait for the end and add the row to `rows`, as `Training.finish` does.

        If the training succeeded, the row also gets the GPU memory from its manifest.
        """
        super().finish(alone)
        manifest = read_json(self.folder / "manifest.json")
        if self.process.returncode == 0 and manifest is not None:
            self.row["gpu_memory"] = manifest.get("gpu_memory")
        return self


def train_undisturbed(sharding: str, processes: int, kind: str = "", **environment: str) -> Start:
    """Train without a stop. Returns the finished training, which may have failed.

    The run's name starts with `kind`, or with `whole` if it is empty. If `kind` starts with `half`, the training is in
    float16. `environment` is added to the command's environment.
    """
    settings = HALF if kind.startswith("half") else SETTINGS
    return Start(f"{kind or 'whole'}-{sharding}-{processes}", sharding, processes, settings, **environment).finish()


def train_in_turn(name: str, ways: tuple[tuple[str, int], ...], settings: tuple[str, ...] = SETTINGS) -> Start:
    """Train a part of the steps in each of `ways`, with a stop and a resume in between.

    A way is a sharding and a number of processes. SIGTERM stops the training at the steps in STOPS. Returns the last
    start of the train command. If a stop does not end with exit code 75, returns that start and does not resume.
    """
    for (sharding, processes), stop in zip(ways[:-1], STOPS, strict=False):
        start = Start(name, sharding, processes, settings)
        start.signal_at(signal.SIGTERM, at=stop)
        start.finish()
        checkpoints = sorted(start.folder.glob("checkpoints/*/checkpoint-*"))
        start.row["files"] = sorted(path.name for folder in checkpoints[-1:] for path in folder.iterdir())
        if start.process.returncode != 75:
            return start
    return Start(name, *ways[-1], settings).finish()


def environment_without_nvcc() -> dict[str, str]:
    """Return PATH and CUDA_HOME such that no CUDA compiler is found, as in the images."""
    paths = [path for path in os.environ["PATH"].split(":") if not (Path(path) / "nvcc").exists()]
    return {"PATH": ":".join(paths), "CUDA_HOME": "/nowhere"}


def try_part(part: str, work: Callable[[], Start]) -> Start | None:
    """Run one part. Returns its training, which may have ended with any exit code.

    If `work` raises an exception, adds a row with it and returns None, so that the other rows are still written.
    """
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        rows.append({"what": f"{part}: failed", "error": f"{type(error).__name__}: {error}"})
        return None


def main(wanted: list[str]) -> None:
    """Add rows for all parts, or for those named in `wanted`, and compare losses with an undisturbed training's.

    The undisturbed training is `half none 1` for parts in float16 and `none 1` for the others. If it is not among the
    parts or fails, there is no comparison.
    """
    make_model_in_a_process("random-llama", RANDOM_LLAMA)
    parts: dict[str, Callable[[], Start]] = {
        "none 1": lambda: train_undisturbed("none", 1),
        "none 2": lambda: train_undisturbed("none", 2),
        "zero3 2": lambda: train_undisturbed("zero3", 2, **environment_without_nvcc()),
        "half none 1": lambda: train_undisturbed("none", 1, "half"),
        "half zero3 2": lambda: train_undisturbed("zero3", 2, "half"),
        "none, on, none": lambda: train_in_turn("turn-none", (("none", 1), ("none", 1))),
        "zero3 2, none 1, zero3 2": lambda: train_in_turn("turn-3", (("zero3", 2), ("none", 1), ("zero3", 2))),
        "half: none 1, zero3 2, none 2": lambda: train_in_turn(
            "turn-half", (("none", 1), ("zero3", 2), ("none", 2)), HALF
        ),
    }
    parts = {name: part for name, part in parts.items() if not wanted or name in wanted}
    longest_first = sorted(parts, key=lambda name: -name.count(","))
    with ThreadPoolExecutor(ONCE) as pool:
        running = {name: pool.submit(try_part, name, parts[name]) for name in longest_first}
        ended = {name: running[name].result() for name in parts}
    for name, one in ended.items():
        other = ended.get("half none 1" if name.startswith("half") else "none 1")
        if one is not None and other is not None and one is not other:
            already = len(rows)
            add_differences(f"{name} against none 1", other, one)
            for row in rows[already:]:
                row["run"] = one.run


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    finally:
        write_rows("zero", rows, "python -m benchmarks.zero", by="run")
        print(json.dumps([row for row in rows if "largest difference of a step's loss" in row], indent=1))
