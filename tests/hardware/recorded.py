"""A machine with recorded GPUs, which a stand-in for pynvml plays, for tests on machines without a GPU.

snapshots/eight_a800.json is in the shape of NVML's answers, but no recording: the memory used on cards 0 to 4 is what a
real shared box had; UUIDs, processes, users, the driver's last digits and the figures of 5 to 7 are made up.
"""

import importlib.util
import json
import os
import pwd
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.hardware import probe

NVML = Path(__file__).parent / "nvml"
SNAPSHOTS = Path(__file__).parent / "snapshots"
GIB = 2**30


class Box:
    """The machine that NVML shows. Change `cards` or `recorded`, then `save()`: the next call of NVML shows it."""

    def __init__(self, folder: Path, recorded: dict[str, Any]) -> None:
        self.file = folder / "nvml.json"
        self.holds = folder / "holds"
        self.proc = folder / "proc"
        self.recorded = deepcopy(recorded)
        self.proc.mkdir()
        for pid, process in recorded["processes"].items():
            (self.proc / pid).mkdir()
            (self.proc / pid / "comm").write_text(process["comm"] + "\n")
            (self.proc / pid / "status").write_text(f"Name:\t{process['comm']}\nUid:\t{process['uid']}\t0\t0\t0\n")
        self.save()

    @property
    def cards(self) -> list[dict[str, Any]]:
        cards: list[dict[str, Any]] = self.recorded["cards"]
        return cards

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables with which another process sees this machine."""
        return {
            "PYTHONPATH": str(NVML),
            "LORRY_NVML_SNAPSHOT": str(self.file),
            "LORRY_GPU_HOLDS": str(self.holds),
            "LORRY_GPU_DENY": "",
            "LORRY_TARGET": "",
        }

    def uuid(self, index: int) -> str:
        return str(self.cards[index]["uuid"])

    def save(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.recorded))
        partial.replace(self.file)

    def free(self, *gib: float) -> None:
        """Set the free memory of each GPU, in GiB."""
        for card, amount in zip(self.cards, gib, strict=True):
            info = card["memory_info"]
            info["free"] = int(amount * GIB)
            info["used"] = info["total"] - info["free"]
        self.save()

    def lose(self, index: int, error: str = "GPU_IS_LOST", function: str = "*") -> None:
        """Make a GPU fail, in one function of NVML or in all."""
        self.cards[index].setdefault("errors", {})[function] = error
        self.save()

    def slice(self, index: int) -> None:
        """Put a GPU into MIG mode."""
        self.cards[index]["mig_mode"] = [1, 1]
        self.save()

    def keep(self, count: int) -> None:
        """Keep only the first `count` GPUs."""
        del self.cards[count:]
        self.save()

    def show(self, pid: int) -> None:
        """Show a real process in the machine's /proc."""
        (self.proc / str(pid)).symlink_to(f"/proc/{pid}")


def stand_in() -> Any:
    spec = importlib.util.spec_from_file_location("pynvml", NVML / "pynvml.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    """A shared machine of eight A800s, as this process sees it."""
    folder = tmp_path / "box"
    folder.mkdir()
    found = Box(folder, json.loads((SNAPSHOTS / "eight_a800.json").read_text(encoding="utf-8")))
    found.show(os.getpid())
    people = {process["uid"]: process["user"] for process in found.recorded["processes"].values()}
    real = pwd.getpwuid
    monkeypatch.setitem(sys.modules, "pynvml", stand_in())
    monkeypatch.setattr(probe, "PROC", found.proc)
    monkeypatch.setattr(
        pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name=people[uid]) if uid in people else real(uid)
    )
    for name, value in found.variables.items():
        if name != "PYTHONPATH":
            monkeypatch.setenv(name, value)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):  # which the code under test sets
        monkeypatch.setenv(name, "")
    for name in ("GPUS", "TARGET", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    yield found
