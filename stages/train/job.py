"""The job that the stage hands to a training process, and the progress that the process sends back."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.contract.recipe import Adapter, Model, Train
from stages.models.chat_settings import ChatSettings
from stages.models.connector import FILE as CONNECTOR_FILE
from stages.train.ladder import During

TEMPLATE_FILE = "chat_template.jinja"
"""The file with the recipe's chat template in the folder of an adapter that was trained with it."""


@dataclass(frozen=True)
class Job:
    """What a training process needs to train one adapter or connector. It leaves nothing for the process to choose."""

    model: Path
    work: Path
    """Folder of the checkpoints."""
    scratch: Path
    """Folder for temporary files of this machine's processes."""
    adapter: Path
    """Folder for the finished adapter or connector. The stage moves it from there to its place."""
    run: Path
    """The run's folder; picture names are relative to it."""
    key: str
    """Digest of everything that the adapter or connector depends on."""
    mix: Adapter
    """The adapter's entry in the recipe, with its data mix."""
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
    """File descriptor to which the process writes its progress."""
    connector: tuple[Path, str] | None = None
    """File and sha256 of the connector that the base gets before the adapter is trained; None: the base's own."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """What the run sets for the chat template."""

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Names of the files in a checkpoint that make up the finished adapter or connector."""
        if self.settings.trains_connector:
            return (CONNECTOR_FILE,)
        return ("adapter_model.safetensors", "adapter_config.json")

    @staticmethod
    def read(path: Path) -> "Job":
        """Read the job from a JSON file that `stages.train.torchrun` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {name: Path(values[name]) for name in ("model", "work", "scratch", "adapter", "run")}
        values |= {name: [Path(p) for p in values[name]] for name in ("train", "validation")}
        values["model_settings"] = Model(**values["model_settings"])
        values["settings"] = Train(**values["settings"])
        values["mix"] = Adapter(**values["mix"])
        values["chat"] = ChatSettings(**values["chat"])
        if values["connector"] is not None:
            file, sha256 = values["connector"]
            values["connector"] = Path(file), sha256
        return Job(**values)


class Progress:
    """Sends progress to the stage, one JSON object per line."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self.only_problems = False
        """Whether to send only errors. Of several processes, only the first sends progress, on behalf of all."""
        self.during: During = "loading"
        """What this process is doing. It decides what the next attempt changes if memory runs out."""
        self.step = 0
        """Number of the last finished optimizer step."""

    def send(self, **fields: Any) -> None:
        """Send these fields as a line of JSON. With `only_problems`, send them only if they are an error.

        The field `event` is `process`, `loaded`, `step`, `loss` or `error`.
        """
        if self.only_problems and fields["event"] != "error":
            return
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Sizes in bytes of a checkpoint's files, by name, without complete.json, which records these sizes."""
    return {p.name: p.stat().st_size for p in sorted(checkpoint.iterdir()) if p.name != "complete.json"}
