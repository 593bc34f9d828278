"""ms-swift's fine-tuning with what Lorry adds: whole checkpoints are marked, a stop saves, the prompt is checked."""

import os
from functools import partialmethod
from pathlib import Path
from typing import Any

from peft import PeftModel
from swift.pipelines.train.sft import SwiftSft
from swift.template.base import MaxLengthError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.contract.errors import UsageError
from stages.contract.files import remove, write_json
from stages.contract.stop import StopRequest
from stages.train.together import Together
from stages.train.worker import Job, Reports, _sizes

# A checkpoint's adapter is read into the processors' memory and copied from there. PEFT reads it to "cuda", which
# safetensors takes for the first card: going on from a checkpoint, every process would hold memory there.
PeftModel.load_adapter = partialmethod(  # type: ignore[assignment, method-assign]
    PeftModel.load_adapter, torch_device="cpu"
)


class LorrySft(SwiftSft):  # type: ignore[misc]
    """`swift sft` for one job."""

    def __init__(self, arguments: list[str], job: Job, reports: Reports, stop: StopRequest, together: Together) -> None:
        super().__init__(arguments)
        self._job, self._reports, self._stop, self._together = job, reports, stop, together

    def fitting(self, samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        """Samples that fit max_length, stripped to what swift reads, and the ids of those that do not.

        Raises UsageError where swift's template renders a conversation otherwise than the model's own chat template,
        which inference uses: the adapter would be tuned on prompts that it never sees.
        """
        kept: list[dict[str, Any]] = []
        left_out: list[str] = []
        for sample in samples:
            row: dict[str, Any] = {"messages": sample["messages"]}
            try:
                encoded = self.template.encode(dict(row))
            except MaxLengthError:
                left_out.append(str(sample["id"]))
                continue
            if not kept:
                self._check_prompt(sample["messages"], encoded)
            kept.append(row)
        return kept, left_out

    def _check_prompt(self, messages: list[dict[str, str]], encoded: dict[str, Any]) -> None:
        tokens, labels = list(encoded["input_ids"]), list(encoded["labels"])
        prompt = next(i for i, label in enumerate(labels) if label != -100)
        own = self.tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if tokens[:prompt] != list(own):
            raise UsageError(
                f"model.swift_template {self._job.model_settings.swift_template!r} renders the prompt otherwise than"
                f" the chat template in {self._job.model}; name the matching one. ms-swift:"
                f" {self.tokenizer.decode(tokens[:prompt])[:300]!r}; the model: {self.tokenizer.decode(own)[:300]!r}"
            )
        if self.tokenizer.eos_token_id not in labels[prompt:]:
            raise UsageError(
                f"model.swift_template {self._job.model_settings.swift_template!r} ends the answer without the model's"
                f" end token {self.tokenizer.eos_token!r}: the tuned model would never stop"
            )

    def train(self, trainer: Any) -> Any:
        trainer.add_callback(_Checkpoints(self._job.work, self._reports, self._stop, self._together))
        return super().train(trainer)


class _Checkpoints(TrainerCallback):
    """Marks checkpoints as whole, reports progress, and turns a stop into a saved checkpoint."""

    def __init__(self, work: Path, reports: Reports, stop: StopRequest, together: Together) -> None:
        self._work, self._reports, self._stop, self._together = work, reports, stop, together

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        checkpoint = self._work / f"checkpoint-{state.global_step}"
        # each process has put its random state there, and the first may not yet see those of other machines
        random_states = self._together.of_all(_saved(checkpoint / f"rng_state_{self._together.rank}.pth"))
        if not self._together.first:
            return
        remove(checkpoint / "complete.json")
        for name in ("args.json", "README.md", "additional_config.json"):
            remove(checkpoint / name)
        for path in checkpoint.iterdir():  # on the disk before the mark is: a power cut must not leave a mark alone
            _sync(path)
        sizes = _sizes(checkpoint)
        for state_of_one in random_states:
            sizes |= state_of_one
        write_json(checkpoint / "complete.json", {"sizes": dict(sorted(sizes.items()))})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._reports.send(event="step", step=state.global_step, total=state.max_steps)
        stopped = self._together.any(self._stop.signal is not None)
        if stopped or state.global_step >= state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None:
            self._reports.send(event="loss", step=state.global_step, loss=float(loss))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _saved(path: Path) -> dict[str, int]:
    """Put a file safely on the disk. Returns its size by its name; nothing where there is none: alone, the first
    process finds it with the others."""
    if not path.is_file():
        return {}
    _sync(path)
    return {path.name: path.stat().st_size}
