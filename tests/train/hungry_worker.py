"""The real training process, on a card that is too small: torch's own error is raised where a real one would be.

HUNGER says when, as JSON: `{"during": "training", "above": 1, "from_step": 3}` lets no forward pass of training have
more than one sample once three steps are done. `above` 0 fails whatever is done, and with `unless_checkpointing` only
without gradient checkpointing; `longer` adds a limit of tokens. During "saving" the process is killed instead, once a
checkpoint's files are written and it is not yet marked as whole. During "scaling" no memory is short: gradients are
scaled as for float16, from `scale` on.

Each of these processes also fails if PEFT chooses a device for an adapter that it reads, as on resuming from a
checkpoint. PEFT's choice is GPU 0 in every process.
"""

import json
import os
import signal
from typing import Any

from stages.train import worker

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.94 MiB is free."
    " Including non-PyTorch memory, this process has 23.6 GiB memory in use."
)


def refuse_device() -> str:
    raise AssertionError("PEFT chose a device")


def make_hungry() -> None:
    import peft.peft_model
    import torch

    from stages.train import swift_sft

    peft.peft_model.infer_device = refuse_device

    hunger = json.loads(os.environ["HUNGER"])
    train = swift_sft.LorrySft.train

    def killed(self: Any, trainer: Any) -> Any:
        real = trainer._save_checkpoint

        def save(*arguments: Any) -> None:
            real(*arguments)
            if trainer.state.global_step >= hunger["from_step"]:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer._save_checkpoint = save
        return train(self, trainer)

    def hungry(self: Any, trainer: Any) -> Any:
        name = {"training": "training_step", "evaluation": "prediction_step"}[hunger["during"]]
        real = getattr(trainer, name)
        fed = hunger.get("unless_checkpointing", False) and self._job.settings.gradient_checkpointing

        def step(model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            late = trainer.state.global_step >= hunger.get("from_step", 0)
            samples, tokens = inputs["input_ids"].shape
            if late and not fed and samples > hunger["above"] and tokens > hunger.get("longer", 0):
                raise torch.OutOfMemoryError(SAID)
            return real(model, inputs, *arguments, **named)

        setattr(trainer, name, step)
        return train(self, trainer)

    def scaled(self: Any, trainer: Any) -> Any:
        accelerator = trainer.accelerator  # which has no scaler on a CPU
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=hunger["scale"])
        return train(self, trainer)

    def loads_nothing(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(SAID)

    if hunger["during"] == "loading":
        swift_sft.LorrySft._prepare_model_tokenizer = loads_nothing  # type: ignore[method-assign]
    elif hunger["during"] == "saving":
        swift_sft.LorrySft.train = killed  # type: ignore[method-assign]
    elif hunger["during"] == "scaling":
        swift_sft.LorrySft.train = scaled  # type: ignore[method-assign]
    else:
        swift_sft.LorrySft.train = hungry  # type: ignore[method-assign]


if __name__ == "__main__":
    arguments = worker._arguments

    def then_make_hungry(*values: Any) -> list[str]:  # the real process imports swift only when it is about to train
        make_hungry()
        return arguments(*values)

    worker._arguments = then_make_hungry
    worker.main()
