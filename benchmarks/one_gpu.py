"""Training on one GPU: precision, stops and kills, memory that other programs hold, and wrong use.

    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.one_gpu [precision | kills | hog | full | use]

Needs an NVIDIA GPU of 80 GB or more, SmolLM2's tokenizer, and a run `prepared` (see benchmarks.two_gpus). Models have
random weights. Lorry's commands run in processes of their own. Nothing is asserted: the rows say what happened.
"""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.random_models import CONFIGS, make_model
from benchmarks.rows import write_rows
from benchmarks.two_gpus import RANDOM_LLAMA, SMALL, Training, make_model_in_a_process, processes_on_gpus
from stages.contract.files import read_json, read_jsonl
from stages.contract.roots import Roots

ROOTS = Roots.from_environment()
DATA = str(Path("recipes/data/patent-qa").absolute())
GIB = 1024**3
rows: list[dict[str, Any]] = []


def add_row(**row: Any) -> None:
    """Add a row to `rows` and print its first 1,500 characters. The arguments are its columns."""
    rows.append(row)
    print(json.dumps(row)[:1500], flush=True)


# -- precision -----------------------------------------------------------------------------------------------------


class PrecisionTraining(Training):
    """A training whose row also says whether all losses are finite, with the mean of the last 13 and unscale errors."""

    def _results(self) -> dict[str, Any]:
        """Return the columns that every training has, and columns about its losses and unscale errors."""
        found = super()._results()
        losses = self.losses() if not self.process.returncode else {}
        log = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        return {
            **found,
            "steps": len(losses),
            "all losses finite": bool(losses) and all(math.isfinite(loss) for loss in losses.values()),
            "mean of the last 13 losses": round(statistics.mean(list(losses.values())[-13:]), 4) if losses else None,
            "unscale errors in the log": len(re.findall("unscale", log)),
        }


def measure_precision() -> None:
    """Train 208 steps in float16 (LoRA in float32, as on a V100) and, at the same time, 208 steps in bfloat16."""
    long = (*SMALL, "train.epochs=16", "train.log_every=1", "train.checkpoint_every=100")
    for training in [
        PrecisionTraining(f"{dtype}, 208 steps", f"precision-{dtype}", "0", (*long, f"train.precision={dtype}"))
        for dtype in ("float16", "bfloat16")
    ]:
        training.finish(alone=False)


# -- kills ---------------------------------------------------------------------------------------------------------


def measure_kills() -> None:
    """Interrupt and resume three trainings, and add rows that compare their losses with an undisturbed training's.

    SIGTERM stops the first one's stage, SIGKILL kills the second one's stage and the third one's training process.
    """
    from benchmarks.two_gpus import add_differences

    whole = Training("one GPU, undisturbed", "kill-none", "0")
    stopped = Training("one GPU, stopped", "kill-term", "0").signal_at(signal.SIGTERM).finish(alone=False)
    killed = Training("one GPU, killed", "kill-kill", "0").signal_at(signal.SIGKILL, at=30).finish(alone=False)
    worker = Training("one GPU, training process killed", "kill-worker", "0")
    worker.signal_at(signal.SIGKILL, worker=0).finish(alone=False)
    whole.finish(alone=False)
    began = [(first, Training(f"{first.row['what']}: goes on", first.run, "0")) for first in (stopped, killed, worker)]
    for first, again in began:
        again.finish(alone=False)
        add_differences(f"{first.row['what']} and gone on with, against undisturbed", whole, again)


# -- memory that others hold -----------------------------------------------------------------------------------------

HOG = """
import sys, torch
held = [torch.zeros(1, device="cuda")]
print("ready", flush=True)
for line in sys.stdin:
    size = int(torch.cuda.mem_get_info()[0] - float(line) * 2**30)
    if size > 2**20:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    print(torch.cuda.mem_get_info()[0] / 2**30, flush=True)
"""


class Hog:
    """A process that holds GPU memory until the `with` block ends. `take_all_but` says how much."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._say, self._hear = self._process.stdin, self._process.stdout
        self._hear.readline()

    def take_all_but(self, gib: float) -> float:
        """Take more memory until only `gib` GiB are free. Returns the GiB that are free then.

        Takes nothing if less is free already.
        """
        self._say.write(f"{gib}\n")
        self._say.flush()
        return round(float(self._hear.readline()), 2)

    def __enter__(self) -> "Hog":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()
        while any(processes_on_gpus()):
            time.sleep(0.1)


HUNGRY = (
    *("model.path=Qwen2.5-0.5B", "train.target_modules=[all-linear]"),
    *("train.effective_batch=8", "train.epochs=2", "train.checkpoint_every=5"),
)


def measure_hog() -> None:
    """Measure whether training recovers, with the same losses, if another program takes most of the GPU's memory.

    The program does so in the middle of one training, and after the planning of another.
    """
    if not (ROOTS.models / "Qwen2.5-0.5B").is_dir():
        make_model(ROOTS.models / "Qwen2.5-0.5B", CONFIGS["Qwen2.5-0.5B"])
    whole = Training("0.5B, the card is free", "hog-none", "0", HUNGRY).finish()
    memory = _memory_by_step(whole)
    add_row(what="memory at steps of the undisturbed run", GiB=memory)
    jump, before = max((memory[b] - memory[a], a) for a, b in pairwise(memory) if a > 5)
    with Hog() as other:
        late = Training("0.5B, another program takes the rest in mid-run", "hog-late", "0", HUNGRY).wait_for(before)
        _finish_disturbed(late, other, jump / 2, whole)
    with Hog() as other:
        early = Training("0.5B, another program takes all but 8 GiB once the plan is made", "hog-early", "0", HUNGRY)
        while not early.events.is_file() or "effective batch" not in early.events.read_text():
            time.sleep(0.02)
        _finish_disturbed(early, other, 8, whole)


def measure_full() -> None:
    """Add rows with what training decides, and how it ends, if only 1 or 5 GiB of the GPU are free from the start."""
    if not (ROOTS.models / "Qwen2.5-0.5B").is_dir():
        make_model(ROOTS.models / "Qwen2.5-0.5B", CONFIGS["Qwen2.5-0.5B"])
    for leave in (1, 5):
        with Hog() as other:
            left = other.take_all_but(leave)
            training = Training(f"0.5B, {leave} GiB are free from the start", f"hog-{leave}", "0", HUNGRY)
            training.row["left by the other, GiB"] = left
            _finish(training, None)


def _finish_disturbed(training: Training, other: Hog, leave: float, whole: Training) -> None:
    """Take all GPU memory but `leave` GiB with `other`, finish the training, and compare its losses with `whole`'s."""
    training.row["left by the other, GiB"] = other.take_all_but(leave)
    _finish(training, whole)


def _finish(training: Training, whole: Training | None) -> None:
    """Wait until a training ends, and add a row with its memory decisions.

    With `whole`, an undisturbed training, also adds a row that compares the losses of the two.
    """
    training.finish(alone=False)
    manifest = read_json(training.folder / "manifest.json") or {"decisions": []}
    rungs = [made for made in manifest["decisions"] if made["what"] in ("out of memory", "fit", "memory")]
    add_row(what=f"{training.row['what']}: what was decided", decisions=rungs)
    if whole is not None:
        _add_loss_row(whole, training)


def _memory_by_step(training: Training) -> dict[int, float]:
    """Return the GPU memory in GiB by step, as a training's events give it."""
    steps = [event for event in read_jsonl(training.events) if event.get("unit") == "steps" and event.get("memory")]
    return {event["step"]: round(event["memory"] / GIB, 2) for event in steps}


def _add_loss_row(whole: Training, other: Training) -> None:
    """Add a row with the largest difference between the losses of `other` and of the undisturbed training `whole`.

    Only steps that both have are compared. If a training failed, no row is added.
    """
    if whole.process.returncode or other.process.returncode:
        return
    one, two = whole.losses(), other.losses()
    apart = {step: round(abs(one[step] - two[step]), 5) for step in one.keys() & two.keys()}
    add_row(
        **{
            "what": f"{other.row['what']}: its losses against undisturbed",
            "steps": [len(one), len(two)],
            "each step once": sorted(two) == list(range(1, len(two) + 1)),
            "largest difference": max(apart.values()),
            "largest step to step change of the undisturbed": round(
                max(abs(b - a) for a, b in pairwise(one.values())), 5
            ),
        }
    )


# -- use -------------------------------------------------------------------------------------------------------------


def measure_use() -> None:
    """Run `lorry doctor`, `lorry plan`, and `lorry launch` with values of --gpus that it must refuse with one GPU.

    Last, runs `lorry launch` with a value that works. Adds a row for each command, with exit code, seconds and last
    lines.
    """
    import pynvml

    pynvml.nvmlInit()
    uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0))
    lorry = [sys.executable, "-m", "entrypoints.lorry"]
    tiny = ["patent-qa", "--profile", "tiny", *(word for one in SMALL for word in ("--set", one))]
    train = [*lorry, "launch", "train", *tiny, "--run", "prepared", "--shard", "0/1"]
    commands: list[tuple[str, list[str], dict[str, str]]] = [
        ("doctor", [*lorry, "doctor"], {}),
        ("plan here", [*lorry, "plan", *tiny], {}),
        ("plan for a 4090", [*lorry, "plan", *tiny, "--target", "rtx4090"], {}),
        ("no such GPU", [*train, "--gpus", "7"], {}),
        ("twice", [*train, "--gpus", "0,0"], {}),
        ("twice, by index and UUID", [*train, "--gpus", f"0,{uuid}"], {}),
        ("no such UUID", [*train, "--gpus", "GPU-00000000"], {}),
        ("a MIG name", [*train, "--gpus", "MIG-00000000-0000-0000-0000-000000000000"], {}),
        ("denied", [*train, "--gpus", "0"], {"LORRY_GPU_DENY": "0"}),
        ("auto, all denied", [*train, "--gpus", "auto"], {"LORRY_GPU_DENY": uuid}),
        ("auto:2 of one", [*train, "--gpus", "auto:2"], {}),
    ]
    for what, command, environment in commands:
        _measure_command(what, command, environment, 40 if what in ("doctor", "plan here") else 2)
    with Hog() as other:
        other.take_all_but(0.5)
        _measure_command("auto, all busy", [*train, "--gpus", "auto"], {}, 6)
    _measure_command("by UUID", [*train, "--gpus", uuid[:12]], {}, 6)


def _measure_command(what: str, command: list[str], environment: dict[str, str], lines: int) -> None:
    """Run a command. Add a row with its exit code, its seconds and the last `lines` lines of its output."""
    began = time.monotonic()
    done = _run(command, environment)
    said = (done.stdout + done.stderr).strip().splitlines()[-lines:]
    add_row(**{"what": what, "exit code": done.returncode, "seconds": round(time.monotonic() - began, 2), "said": said})


def _run(command: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a command with these environment variables added. Returns its exit code and output.

    Raises subprocess.TimeoutExpired if it takes more than 240 s.
    """
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **environment}, timeout=240
    )


def main() -> None:
    """Measure all parts, or those named as arguments, and write the rows after each part.

    If a part raises an exception, the other parts still run.
    """
    parts = {"precision": measure_precision, "kills": measure_kills, "hog": measure_hog, "full": measure_full}
    parts |= {"use": measure_use}
    make_model_in_a_process("random-llama", RANDOM_LLAMA)
    import traceback

    from benchmarks import two_gpus

    for part in sys.argv[1:] or parts:
        try:
            parts[part]()
        except Exception:  # noqa: BLE001 - the other parts are still useful
            traceback.print_exc()
        for row in [*two_gpus.rows, *rows]:
            row.setdefault("part", part)
        command = f"python -m benchmarks.one_gpu {' '.join(sys.argv[1:])}".strip()
        write_rows("one_gpu", [*two_gpus.rows, *rows], command, by="part")


if __name__ == "__main__":
    main()
