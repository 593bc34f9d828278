"""The job that the stage hands to a training process, and the progress that the process sends back."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.recipe import Adapter, Model, Train
from stages.models.connector import FILE as CONNECTOR_FILE
from stages.train.ladder import During


@dataclass(frozen=True)
class Job:
    """One training with every choice made."""

    model: Path
    work: Path
    """Folder of this adapter's checkpoints."""
    scratch: Path
    """Folder for files that only this machine's processes need."""
    adapter: Path
    """Folder that the finished adapter or connector goes to."""
    run: Path
    """The run's folder; picture names are relative to it."""
    key: str
    """Digest of everything that the adapter depends on."""
    mix: Adapter
    """The adapter's data mix."""
    train: list[Path]
    validation: list[Path]
    seed: int
    dtype: str
    sharding: str
    """`none`, `zero2` or `zero3`."""
    micro_batch: int
    accumulation: int
    processes: int
    """Training processes over all machines."""
    eval_micro_batch: int
    evaluate: bool
    use_cpu: bool
    cards: list[str]
    """Name and UUID of each GPU of this machine, by local rank."""
    model_settings: Model
    settings: Train
    progress: int
    """File descriptor that progress is written to."""
    connector: tuple[Path, str] | None = None
    """File and sha256 of the connector that the adapter is trained with."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the checkpoint's files that the finished adapter or connector consists of."""
        if self.settings.trains_connector:
            return (CONNECTOR_FILE,)
        return ("adapter_model.safetensors", "adapter_config.json")

    @staticmethod
    def read(path: Path) -> "Job":
        """Read a job from its JSON file."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {name: Path(values[name]) for name in ("model", "work", "scratch", "adapter", "run")}
        values |= {name: [Path(p) for p in values[name]] for name in ("train", "validation")}
        values["model_settings"] = Model(**values["model_settings"])
        values["settings"] = Train(**values["settings"])
        values["mix"] = Adapter(**values["mix"])
        if values["connector"] is not None:
            file, sha256 = values["connector"]
            values["connector"] = Path(file), sha256
        return Job(**values)


class Progress:
    """Sends progress to the stage, one JSON object per line."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self.only_problems = False
        """Send errors only: of several processes, the first sends the progress of all."""
        self.during: During = "loading"
        """Phase of this process; it decides what changes when memory runs out."""
        self.step = 0
        """The last finished optimizer step."""

    def send(self, **fields: Any) -> None:
        """Send one message; `event` is its kind."""
        if self.only_problems and fields["event"] != "error":
            return
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Size in bytes of each of a checkpoint's files, by name, without the mark complete.json."""
    return {p.name: p.stat().st_size for p in sorted(checkpoint.iterdir()) if p.name != "complete.json"}
