"""A stage whose work is a few lines, run by `run_stage` as the real ones: `python -m tests.contract.some_stage WORK`.

The tests of the runner start it as a process, to signal and to kill it.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stages.contract.errors import DataError
from stages.contract.files import JsonlJournal, write_jsonl
from stages.contract.part import requested_part
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.host.runner import run_stage

STEPS = 20


def count(stage: Stage) -> None:
    """Write twenty records, one every 50 ms; a start after a stop continues there."""
    with JsonlJournal(stage.path("records.jsonl")) as journal:
        for step in range(len(journal.records), STEPS):
            journal.append([{"step": step, "process": os.getpid()}])
            stage.events.report_progress("count", step + 1, STEPS, "steps")
            time.sleep(0.05)
            stage.stop.check()
    stage.outputs["records.jsonl"] = STEPS


def write(stage: Stage) -> None:
    """Write samples, pages and a cache."""
    for name in ("train", "validation", "test"):
        path = f"samples/{name}.jsonl"
        stage.outputs[path] = write_jsonl(stage.path(path), [{"id": name}])
    stage.path("pages").mkdir(exist_ok=True)
    stage.path("pages", "1.jpg").write_bytes(b"one")
    stage.path("pages", "2.jpg").write_bytes(b"two")
    stage.outputs["pages/"] = None
    stage.skip("q1", "empty question", "half a pair: \ud800")


def wait(stage: Stage) -> None:
    """Hold the stage until the process is killed."""
    stage.events.say("waiting")
    while True:
        time.sleep(0.05)
        stage.stop.check()


def deaf(stage: Stage) -> None:
    """Sleep without ever checking for a stop."""
    stage.events.say("waiting")
    while True:
        time.sleep(0.05)


def load(stage: Stage) -> None:
    """Sleep where nothing is to be saved."""
    with stage.stop.waiting(False):
        deaf(stage)


def crash(stage: Stage) -> None:
    print("a library's last words")
    raise ZeroDivisionError("a bug in Lorry")


def unusable(stage: Stage) -> None:
    for number in range(1, 6):
        stage.skip(f"x.jsonl:{number}", "no question", f"found {number}")
    raise DataError("x.jsonl: nothing in it")


def out_of_memory(stage: Stage) -> None:
    raise MemoryError


def killed(stage: Stage) -> None:
    stage.path("half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


WORKS: dict[str, Callable[[Stage], None]] = {
    work.__name__: work for work in (count, write, wait, deaf, load, crash, unusable, out_of_memory, killed)
}

if __name__ == "__main__":
    recipe = load_recipe(Path(sys.argv[2]))
    shard = sys.argv[sys.argv.index("--shard") + 1] if "--shard" in sys.argv else None
    sys.exit(
        run_stage(
            Run("r", recipe, Roots.from_environment()),
            "preprocess",
            WORKS[sys.argv[1]],
            "--force" in sys.argv,
            requested_part("preprocess", shard, {}),
        )
    )
