"""The job that the stage hands to a training process, and the progress that the process sends back."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stages.contract.files import write_json
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
    """`none` or `zero3`."""
    pass_tokens: int
    """Most tokens of a training pass, unless one sample is longer."""
    processes: int
    """Training processes over all machines."""
    evaluation_tokens: int
    """As pass_tokens, in an evaluation."""
    evaluate: bool
    use_cpu: bool
    cards: list[str]
    """Name and UUID of each GPU of this machine, by local rank."""
    model_settings: Model
    settings: Train
    progress: int
    """File descriptor to which the process writes its progress."""
    checkpointed_layers: int = 0
    """Number of decoder layers that compute their activations again in the backward pass: the first ones. All if
    `settings.gradient_checkpointing` is set."""
    connector: tuple[Path, str] | None = None
    """File and sha256 of the connector that the base gets before the adapter is trained; None: the base's own."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """What the run sets for the chat template."""

    @property
    def is_sharded(self) -> bool:
        """Whether the base is sharded over the processes."""
        return self.sharding == "zero3" and self.processes > 1

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Names of the files in a checkpoint that make up the finished adapter or connector."""
        if self.settings.trains_connector:
            return (CONNECTOR_FILE,)
        return ("adapter_model.safetensors", "adapter_config.json")

    @property
    def base(self) -> tuple[Any, ...] | None:
        """What decides which base a process has on its GPU; None if it cannot be kept there for the next adapter."""
        if self.is_sharded or self.settings.trains_connector:
            return None
        return self.model, self.dtype, self.settings.load_in_4bit, self.connector, self.processes, self.cards

    def write(self, path: Path) -> None:
        """Write the job to a JSON file, for `read`."""
        write_json(path, _json_value(asdict(self)))

    @staticmethod
    def read(path: Path) -> "Job":
        """Read the job from a file that `write` wrote."""
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
        self._file = os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace")
        self.only_problems = False
        """Whether to send only errors. Of several processes, only the first sends progress, on behalf of all."""
        self.during: During = "loading"
        """What this process is doing. It decides what the next attempt changes if memory runs out."""
        self.step = 0
        """Number of the last finished optimizer step."""
        self.one_by_one = False
        """Whether each pass has one sample."""

    def send(self, **fields: Any) -> None:
        """Send these fields as a line of JSON. With `only_problems`, send them only if they are an error.

        The field `event` is `process`, `loaded`, `step`, `entry` (of the log), `done` or `error`.
        """
        if self.only_problems and fields["event"] != "error":
            return
        # a line of several processes is written whole only up to 4,096 bytes: no escapes
        self._file.write(json.dumps(fields, ensure_ascii=False) + "\n")
        self._file.flush()


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Sizes in bytes of a checkpoint's files, by name, without complete.json, which records these sizes."""
    return {p.name: p.stat().st_size for p in sorted(checkpoint.iterdir()) if p.name != "complete.json"}


def _json_value(value: Any) -> Any:
    """Convert a value to JSON's types: paths become text, settings become dicts. Returns the result."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return value
