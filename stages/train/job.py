"""What the stage hands to a training process, and how that one sends its progress back."""

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
    """What to train, with everything decided."""

    model: Path
    work: Path
    """Checkpoints of this adapter."""
    scratch: Path
    """What only this machine's processes need."""
    adapter: Path
    """Where the finished adapter goes, or the connector."""
    run: Path
    """The run's folder, which pictures are named relative to."""
    key: str
    """Digest of all that the adapter depends on."""
    mix: Adapter
    """What of the samples it is trained on."""
    train: list[Path]
    validation: list[Path]
    seed: int
    dtype: str
    sharding: str
    """`none`, `zero2` or `zero3`."""
    micro_batch: int
    accumulation: int
    processes: int
    """How many train together, over all machines."""
    eval_micro_batch: int
    evaluate: bool
    use_cpu: bool
    cards: list[str]
    """This machine's GPUs in words, by local rank."""
    model_settings: Model
    settings: Train
    progress: int
    """File descriptor to report progress on."""
    connector: tuple[Path, str] | None = None
    """What the adapter is trained on the base with, and its sha256."""

    @property
    def weights(self) -> tuple[str, ...]:
        """The files of a checkpoint that are handed on."""
        if self.settings.trains_connector:
            return (CONNECTOR_FILE,)
        return ("adapter_model.safetensors", "adapter_config.json")

    @staticmethod
    def read(path: Path) -> "Job":
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
    """Progress to the stage, one JSON object a line."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self.only_problems = False
        """Of several processes one speaks for all."""
        self.during: During = "loading"
        """What this process is at: it decides what running out of memory changes."""
        self.step = 0
        """The last optimizer step that was finished."""

    def send(self, **fields: Any) -> None:
        if self.only_problems and fields["event"] != "error":
            return
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()


def file_sizes(checkpoint: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(checkpoint.iterdir()) if p.name != "complete.json"}
