"""Kill every stage with SIGKILL at random moments, run the same command again, and compare with an undisturbed run.

Twenty-four kills: six for each stage, at moments drawn from a seed over the stage's own undisturbed duration. Samples,
adapters, predictions and scores must be the same bytes. What was finished before the kill must not be done again.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.contract.files import sha256_file
from tests.small_inputs import RANDOM_LLAMA

KILLS = 6

OUTPUTS = {
    "preprocess": [
        "samples/train.jsonl",
        "samples/validation.jsonl",
        "samples/test.jsonl",
        "pages.parquet",
        "vectors.npy",
    ],
    "train": ["adapters/tuned/adapter_model.safetensors", "metrics.jsonl"],
    "infer": ["predictions/base.jsonl", "predictions/tuned.jsonl", "losses/base.jsonl", "losses/tuned.jsonl"],
    "eval": ["scores.json", "by_group.json", "losses.json", "losses.jsonl"],
}

pytestmark = pytest.mark.kill


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory, small_models: Path, demo_subset: Path) -> Iterator["Arena"]:
    """An undisturbed run of all four stages, and the place for the disturbed ones."""
    arena = Arena(tmp_path_factory.mktemp("kill"), small_models, demo_subset)
    for stage in ("preprocess", "train", "infer", "eval"):
        before = time.monotonic()
        code = arena.start("calm", stage).wait()
        assert code == 0, arena.log("calm", stage)
        arena.seconds[stage] = time.monotonic() - before
    yield arena


class Arena:
    """Runs below one folder, all of one recipe."""

    def __init__(self, folder: Path, models: Path, data: Path) -> None:
        self.runs = folder / "runs"
        self.seconds: dict[str, float] = {}
        self.environment = {
            **os.environ,
            "LORRY_RUNS": str(self.runs),
            "LORRY_MODELS": str(models),
            "LORRY_DATA": str(data.parent),
        }
        self.options = ["patent-qa", "--profile", "tiny", "--set", f"data.path={data.name}"]
        for override in (
            *RANDOM_LLAMA,
            "train.effective_batch=4",
            "train.checkpoint_every=2",
            "train.epochs=2",
            "infer.chunk_size=4",
            "infer.batch_size=2",
            "infer.max_new_tokens=16",
            "infer.losses=true",
        ):
            self.options += ["--set", override]

    def start(self, run: str, stage: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", f"entrypoints.{stage}", *self.options, "--run", run]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def log(self, run: str, stage: str) -> str:
        path = self.runs / run / stage / "log.txt"
        return path.read_text(errors="replace")[-3000:] if path.is_file() else "no log"

    def begin(self, run: str, stage: str) -> None:
        """A run whose earlier stages are the calm run's."""
        for earlier in ("preprocess", "train", "infer", "eval"):
            if earlier == stage:
                return
            shutil.copytree(self.runs / "calm" / earlier, self.runs / run / earlier)

    def events(self, run: str, stage: str) -> list[dict[str, object]]:
        path = self.runs / run / stage / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]


def test_preprocess_survives_kills(arena: Arena) -> None:
    def finished() -> dict[str, int]:
        """Modification times of the pictures of page ranges that are finished."""
        folder = arena.runs / "killed-preprocess" / "preprocess"
        times = {}
        for kept in (folder / "cache" / "pages").glob("*/*.json"):
            for record in json.loads(kept.read_text())["records"]:
                picture = folder.parent / record["image"]
                times[str(picture)] = picture.stat().st_mtime_ns
        return times

    kill_repeatedly(arena, "preprocess", finished)
    same_bytes(arena, "preprocess")


def test_train_survives_kills(arena: Arena) -> None:
    def finished() -> dict[str, int]:
        """Steps of whole checkpoints, and whether the adapter is there; a restart must not begin before either."""
        folder = arena.runs / "killed-train" / "train"
        whole = folder.glob("checkpoints/tuned/checkpoint-*/complete.json")
        steps = [int(path.parent.name.split("-")[1]) for path in whole]
        finished = ("adapters/tuned", "checkpoints/tuned/finished/tuned")
        return {"newest": max(steps, default=0), "adapter": int(any((folder / one).is_dir() for one in finished))}

    kill_repeatedly(arena, "train", finished, grows=True)
    same_bytes(arena, "train")


def test_infer_survives_kills(arena: Arena) -> None:
    def finished() -> dict[str, int]:
        """Records answered so far."""
        folder = arena.runs / "killed-infer" / "infer" / "partial"
        return {path.name: path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl")}

    kill_repeatedly(arena, "infer", finished, grows=True)
    same_bytes(arena, "infer")


def test_eval_survives_kills(arena: Arena) -> None:
    kill_repeatedly(arena, "eval", dict)
    same_bytes(arena, "eval")


def kill_repeatedly(arena: Arena, stage: str, finished, grows: bool = False) -> None:  # type: ignore[no-untyped-def]
    """Kill the stage KILLS times, each time some way into what is left of it, then let it finish.

    After each kill nothing of it is alive, and what `finished` says was done is still so at the end of the next start:
    unchanged, or grown.
    """
    run = f"killed-{stage}"
    arena.begin(run, stage)
    draw = random.Random(f"{stage} 7")
    # starting up takes most of a short run: moments are drawn over all of it, so that kills also land in the work
    landed = 0
    before: dict[str, int] = {}
    for _ in range(4 * KILLS):
        if landed == KILLS:
            break
        process = arena.start(run, stage)
        try:
            process.wait(timeout=draw.uniform(0.15, 1.0) * arena.seconds[stage])
            # it ended before the kill: begin the stage anew so that the next kill has something to hit
            assert process.returncode == 0, arena.log(run, stage)
            same_bytes(arena, stage)
            shutil.rmtree(arena.runs / run / stage)
            before = {}
            continue
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        landed += process.wait() == -signal.SIGKILL
        nothing_left_of(process.pid)
        now = finished()
        for name, value in before.items():
            assert now.get(name, 0) >= value if grows else now.get(name) == value, (name, value, now.get(name))
        before = now
    last = arena.start(run, stage)
    assert last.wait() == 0, arena.log(run, stage)
    assert landed == KILLS
    if stage == "train":
        resumed = json.loads((arena.runs / run / "train" / "manifest.json").read_text())["decisions"]
        steps = [int(str(d["value"]).split("-")[1]) for d in resumed if d["what"] == "resumed"]
        assert steps == [before["newest"]] if before["newest"] and not before["adapter"] else steps == []


def nothing_left_of(session: int) -> None:
    """No process of the killed command's session is alive, a moment later."""
    for _ in range(100):
        alive = _alive(session)
        if not alive:
            return
        time.sleep(0.1)
    told = {pid: _command(pid) for pid in alive}
    raise AssertionError(f"still alive after the kill: {told}")


def _alive(session: int) -> list[str]:
    found = subprocess.run(["pgrep", "-s", str(session)], check=False, capture_output=True, text=True).stdout.split()
    return [pid for pid in found if (stat := _stat(pid)) and stat[0] != "Z"]


def _stat(pid: str) -> list[str]:
    """State, parent and more of a process, as proc(5) lists them behind its name; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""


def same_bytes(arena: Arena, stage: str) -> None:
    for name in OUTPUTS.get(stage, []):
        calm, killed = (arena.runs / run / stage / name for run in ("calm", f"killed-{stage}"))
        assert sha256_file(calm) == sha256_file(killed), name
