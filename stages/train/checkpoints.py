"""Checkpoints of a training: all that resuming needs, on any number of GPUs.

checkpoint-<step>/
    adapter_model.safetensors   the LoRA weights in float32, in PEFT's form (a connector: its own file)
    optimizer.safetensors       `<name>.exp_avg`, `<name>.exp_avg_sq` and `<name>.step` for each weight
    state.json                  `State`
    complete.json               the files' sizes; written last, so a checkpoint without it is not whole
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.contract.files import flush, read_json, remove, write_json
from stages.train.job import Job, file_sizes
from stages.train.together import Together

if TYPE_CHECKING:
    import torch

    from stages.train.trainee import Trainee

NAMES = "checkpoint-*[0-9]"
"""Pattern of the checkpoints' folders. A copy that a user made and named otherwise stays."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""torch's names of AdamW's state of a weight: two tensors of its shape, and a number."""


@dataclass
class State:
    """Where a training is, apart from weights and optimizer."""

    step: int = 0
    """Finished optimizer steps."""
    tokens: int = 0
    """Tokens of all steps."""
    skipped_steps: int = 0
    """Updates that float16's loss scale skipped."""
    loss_scale: tuple[float, int] | None = None
    """float16's loss scale, and the steps since its last change."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """Entries as in training.json."""


class Checkpoints:
    """Saves and loads the checkpoints of one training."""

    def __init__(self, job: Job, together: Together) -> None:
        self._job, self._together = job, together

    def save(self, state: State, trainee: "Trainee", optimizer: "torch.optim.Optimizer") -> None:
        """Save a checkpoint, flush it to the disk, mark it as complete, and delete the oldest ones.

        train.keep_checkpoints checkpoints are left. All processes must call this; the first one writes.
        """
        from safetensors.torch import save_file

        if not self._together.is_first:
            return
        earlier = checkpoints_of_earlier_versions(self._job.work)
        folder = self._job.work / f"checkpoint-{state.step}"
        if folder in earlier:
            earlier[earlier.index(folder)] = folder.rename(folder.with_name(f"earlier-{folder.name}"))
        remove(folder)
        folder.mkdir(parents=True)
        trainee.save(folder)
        save_file(optimizer_state(trainee, optimizer), folder / "optimizer.safetensors")
        write_json(folder / "state.json", asdict(state))
        flush(folder)  # before the mark: a power cut must not leave a mark without its files
        write_json(folder / "complete.json", {"sizes": file_sizes(folder)})
        for path in earlier:  # a user may have gone back to that version until now
            remove(path)
        older = [path for path in self._job.work.glob(NAMES) if step_of(path) < state.step]
        for path in sorted(older, key=step_of, reverse=True)[self._job.settings.keep_checkpoints - 1 :]:
            remove(path)

    def load(self, folder: Path, trainee: "Trainee", optimizer: "torch.optim.Optimizer") -> State:
        """Restore weights and optimizer from a complete checkpoint. Returns its state."""
        from safetensors.torch import load_file

        trainee.load(folder)
        saved = load_file(folder / "optimizer.safetensors")
        names = {weight: name for name, weight in trainee.weights.items()}
        states: dict[int, dict[str, torch.Tensor]] = {}
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for number, weight in enumerate(weights):
            found = {what: saved[f"{names[weight]}.{what}"] for what in MOMENTS if f"{names[weight]}.{what}" in saved}
            if found:
                states[number] = found
        # torch moves each tensor to the device where its own step would create it
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        values = read_json(folder / "state.json")
        scale = values.pop("loss_scale")
        return State(**values, loss_scale=None if scale is None else (scale[0], scale[1]))


def optimizer_state(trainee: "Trainee", optimizer: "torch.optim.Optimizer") -> "dict[str, torch.Tensor]":
    """AdamW's state by weight name, on the CPU. Empty before the first step."""
    return {
        f"{name}.{what}": value.detach().cpu().contiguous()
        for name, weight in trainee.weights.items()
        for what, value in optimizer.state.get(weight, {}).items()
    }


def newest_complete_checkpoint(work: Path) -> Path | None:
    """Return the newest complete checkpoint in the folder `work`; None if it has none. Deletes incomplete checkpoints,
    and ignores those of earlier versions.

    A checkpoint is complete if its files have the sizes in its complete.json. That file is missing if the process was
    killed while it saved.
    """
    good = []
    for path in work.glob(NAMES):
        complete = read_json(path / "complete.json")
        if complete is None or file_sizes(path) != complete["sizes"]:
            remove(path)
        elif (path / "state.json").is_file():
            good.append(path)
    return max(good, key=step_of, default=None)


def checkpoints_of_earlier_versions(work: Path) -> list[Path]:
    """Complete checkpoints in the folder `work` that this version cannot resume, since another trainer saved them. They
    stay until the first checkpoint of this version is complete."""
    found = (path for path in work.glob(f"*{NAMES}") if (path / "complete.json").is_file())
    return sorted((path for path in found if not (path / "state.json").is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint, `checkpoint-<step>`."""
    return int(checkpoint.name.rpartition("-")[2])
