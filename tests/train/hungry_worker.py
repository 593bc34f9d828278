"""The real training process, on a card that is too small: torch's own error is raised where a real one would be.

HUNGER says when, as JSON: `{"during": "training", "above": 1, "from_step": 3}` lets no forward pass of training have
more than one sample once three steps are done. `above` 0 fails whatever is done, and with `unless_checkpointing` only
without gradient checkpointing; `longer` adds a limit of tokens, `adapter` names the only one that it is for. During
"saving" the process is killed instead, once a checkpoint's files are written and it is not yet marked as whole. During
"scaling" no memory is short: gradients are scaled as for float16, from `scale` on.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

from stages.train import worker

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.94 MiB is free."
    " Including non-PyTorch memory, this process has 23.6 GiB memory in use."
)


def make_hungry() -> None:
    import torch

    from stages.train import base, checkpoints
    from stages.train.loop import Loop, LossScale
    from stages.train.trainee import Trainee

    hunger = json.loads(os.environ["HUNGER"])
    loops: list[Loop] = []
    began, add_gradients, loss, write_json = Loop.__init__, Trainee.add_gradients, Trainee.loss, checkpoints.write_json

    def begin(self: Loop, *arguments: Any) -> None:
        began(self, *arguments)
        loops.append(self)
        if hunger["during"] == "scaling":  # a CPU has no scale of its own
            self._scale = LossScale(hunger["scale"])

    def refuse(samples: int, tokens: int) -> None:
        settings = loops[-1]._job.settings
        fed = hunger.get("unless_checkpointing", False) and (
            loops[-1]._job.checkpointed_layers or settings.gradient_checkpointing
        )
        fed = fed or hunger.get("adapter", loops[-1]._job.adapter.name) != loops[-1]._job.adapter.name
        late = loops[-1].state.step >= hunger.get("from_step", 0)
        if late and not fed and samples > hunger["above"] and tokens > hunger.get("longer", 0):
            raise torch.OutOfMemoryError(SAID)

    def hungry_gradients(self: Trainee, prepared: Any, factor: float) -> None:
        refuse(prepared.sequences, len(prepared.tensors.tokens))
        add_gradients(self, prepared, factor)

    def hungry_loss(self: Trainee, sequences: Any) -> tuple[float, float]:
        refuse(len(sequences), sum(sequence.length for sequence in sequences))
        return loss(self, sequences)

    def kill_before_mark(path: Path, value: Any) -> None:
        if path.name == "complete.json" and loops[-1].state.step >= hunger["from_step"]:
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(path, value)

    def loads_nothing(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(SAID)

    Loop.__init__ = begin  # type: ignore[method-assign]
    if hunger["during"] == "loading":
        base.load_base = loads_nothing
    elif hunger["during"] == "saving":
        checkpoints.write_json = kill_before_mark
    elif hunger["during"] == "training":
        Trainee.add_gradients = hungry_gradients  # type: ignore[method-assign]
    elif hunger["during"] == "evaluation":
        Trainee.loss = hungry_loss  # type: ignore[method-assign]


if __name__ == "__main__":
    read_encoded = worker.read_encoded

    def then_make_hungry(job: worker.Job) -> Any:  # every process calls it, once it has imported torch
        worker.read_encoded = read_encoded
        make_hungry()
        return read_encoded(job)

    worker.read_encoded = then_make_hungry
    worker.main()
