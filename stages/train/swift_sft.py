"""ms-swift's fine-tuning with what Lorry adds: whole checkpoints are marked, a stop saves, the prompt is checked."""

import copy
import importlib
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import PeftModel
from PIL import Image, UnidentifiedImageError
from swift.pipelines.train.sft import SwiftSft
from swift.template.base import MaxLengthError
from transformers import BatchFeature, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.contract.errors import DataError, UsageError
from stages.contract.files import remove, write_json
from stages.contract.stop import StopRequest
from stages.models import gptq, mgm
from stages.models.pictures import PictureRules, Rules, SquareRules, family_rules, open_picture
from stages.models.rendering import PLACEHOLDER, Renderer
from stages.train import llava_templates  # noqa: F401 - registers templates
from stages.train.connector_sft import train_connector_only
from stages.train.job import Job, Progress, file_sizes
from stages.train.optimizer_state import keep_by_name
from stages.train.sharding import compute_in, gather_by_layer, let_go_of_weights
from stages.train.together import Together

if mgm.AVAILABLE:
    from stages.train import mgm_swift  # noqa: F401 - registers the model and its template

# A checkpoint's adapter is read into the processors' memory and copied from there. PEFT reads it to "cuda", which
# safetensors takes for the first card: going on from a checkpoint, every process would hold memory there.
PeftModel.load_adapter = partialmethod(  # type: ignore[assignment, method-assign]
    PeftModel.load_adapter, torch_device="cpu"
)


class LorrySft(SwiftSft):  # type: ignore[misc]
    """`swift sft` for one job."""

    def __init__(
        self, arguments: list[str], job: Job, progress: Progress, stop: StopRequest, together: Together
    ) -> None:
        with gptq.loading(job.model, on_card=not job.use_cpu, training=True):
            super().__init__(arguments)
        self._job, self._progress, self._stop, self._together = job, progress, stop, together
        self._renderer = Renderer(job.model)
        self._rules = family_rules(job.model)
        if self._rules is not None:
            self.template._load_image = partial(_load_picture, self._rules, job.settings.max_pixels)
            # what comes after it in ms-swift must leave that size: its own budget, and rounding to four tokens or more
            self.template.max_pixels = None
        if isinstance(self._rules, PictureRules):
            picture_utils: Any = importlib.import_module("qwen_vl_utils.vision_process")
            picture_utils.IMAGE_MIN_TOKEN_NUM = 1
        self.log: list[dict[str, Any]] = []
        """The trainer's log of all steps, once it has trained; and the tokens of all steps, without padding."""
        self.tokens = 0

    def fitting(self, samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        """Samples that fit max_length, stripped to what swift reads, and the ids of those that do not.

        Raises UsageError where swift's template renders a conversation otherwise than inference does, by the model's
        own chat template: the adapter would be tuned on prompts that it never sees. The first sample without a picture
        is compared and, with a model whose pictures' tokens we can count, the first with one.
        """
        with self._pictures_blank():
            return self._fitting(samples)

    def _fitting(self, samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        kept: list[dict[str, Any]] = []
        left_out: list[str] = []
        compared: set[bool] = set()
        for sample in samples:
            row: dict[str, Any] = {"messages": sample["messages"]}
            files = [self._job.run / name for name in sample.get("images") or []]
            if files:
                row["images"] = [str(_picture(file, str(sample["id"]))) for file in files]
            try:
                encoded = self._encoded(row)
            except MaxLengthError:
                left_out.append(str(sample["id"]))
                continue
            if bool(files) not in compared and (not files or self._rules is not None):
                self._check_prompt(str(sample["id"]), sample["messages"], files, encoded)
                compared.add(bool(files))
            kept.append(row)
        return kept, left_out

    @contextmanager
    def _pictures_blank(self) -> Iterator[None]:
        """While this lasts, a LLaVA's processor makes the same of every picture, at once: it would enlarge each blank
        one, which takes minutes for some ten thousand samples."""
        if not isinstance(self._rules, SquareRules):
            yield
            return
        processor = self.template.processor
        real = processor.image_processor
        blank = real(images=[Image.new("RGB", (self._rules.factor, self._rules.factor))], return_tensors="pt")

        def repeated(images: list[Any], **_: Any) -> BatchFeature:
            return BatchFeature({name: one.expand(len(images), *one.shape[1:]) for name, one in blank.items()})

        processor.image_processor = repeated
        try:
            yield
        finally:
            processor.image_processor = real

    def _encoded(self, row: dict[str, Any]) -> dict[str, Any]:
        """A sample as swift's template encodes it. Raises MaxLengthError where it is longer than max_length.

        Where a picture's tokens are known from its size, no pixel is read: blank pictures of one patch stand in.
        """
        row = copy.deepcopy(row)  # the template puts the opened pictures in place of the names
        if "images" not in row or self._rules is None:
            encoded: dict[str, Any] = self.template.encode(row)
            return encoded
        pictures = [open_picture(Path(name), self._rules, self._job.settings.max_pixels) for name in row["images"]]
        blank = Image.new("RGB", (self._rules.factor, self._rules.factor))
        encoded = self.template.encode({**row, "images": [blank] * len(pictures)})
        length = len(encoded["input_ids"]) + sum(picture.tokens - self._of_a_blank for picture in pictures)
        if length > self._job.settings.max_length:
            raise MaxLengthError(f"{length} tokens")
        return encoded

    @property
    def _of_a_blank(self) -> int:
        """Tokens of a blank picture of one patch."""
        return self._rules.tokens(self._rules.factor, self._rules.factor) if self._rules else 0

    def _check_prompt(
        self, sample: str, messages: list[dict[str, str]], pictures: list[Path], encoded: dict[str, Any]
    ) -> None:
        """Compare the prompt with what inference makes of it, both with blank pictures."""
        tokens, labels = list(encoded["input_ids"]), list(encoded["labels"])
        prompt = next(i for i, label in enumerate(labels) if label != -100)
        said = tokens[:prompt]
        try:
            # up to the first answer: all of a conversation's are learnt
            asked = list(takewhile(lambda message: message["role"] != "assistant", messages))
            shown = pictures[: sum(message["content"].count(PLACEHOLDER) for message in asked)]
            rendered = self._renderer.render(sample, asked, shown)  # type: ignore[arg-type]
            own = rendered.tokens  # a model that only reads has no token for pictures
            if pictures:
                own = rendered.expanded([self._of_a_blank] * len(shown), self._renderer.picture_token)
        except DataError as error:
            raise DataError(f"sample {sample}: {error}") from error
        if said != own:
            raise UsageError(
                f"model.swift_template {self._job.model_settings.swift_template!r} renders the prompt otherwise than"
                f" the chat template in {self._job.model}; name the matching one. ms-swift:"
                f" {self.tokenizer.decode(said)[:300]!r}; the model: {self.tokenizer.decode(own)[:300]!r}"
            )
        if self.tokenizer.eos_token_id not in labels[prompt:]:
            raise UsageError(
                f"model.swift_template {self._job.model_settings.swift_template!r} ends the answer without the model's"
                f" end token {self.tokenizer.eos_token!r}: the tuned model would never stop"
            )

    def train(self, trainer: Any) -> Any:
        if self._job.settings.trains_connector:
            train_connector_only(trainer, self._job.model, self._together)
        elif self._job.settings.freeze_vision:
            _refuse_adapted_vision(trainer.model)
        count = _TokenCount(trainer.data_collator, self._progress)
        trainer.data_collator = count.collate
        trainer.add_callback(_Checkpoints(self._job, self._progress, self._stop, self._together, count))
        # it would delete the last whole checkpoint before the new one is marked as whole; _Checkpoints does it after
        trainer.args.save_total_limit = None
        trainer._evaluate = partial(_evaluate_apart, trainer, trainer._evaluate, self._progress)
        # transformers 4 takes the micro-batch of the checkpoint that it goes on from; it may have been made with more
        trainer._inner_training_loop = _with_micro_batch(trainer._inner_training_loop, self._job.micro_batch)
        if self._job.sharding != "none":
            compute_in(self._job.dtype, trainer.model)
        if self._job.sharding == "zero3":
            settings = self._job.settings
            # into the first layer of an adapted vision tower goes a picture, which asks for none
            gather_by_layer(trainer.model, settings.gradient_checkpointing and settings.freeze_vision)
            trainer.add_callback(_WeightsLetGo())
        keep_by_name(trainer, self._together)
        try:
            return super().train(trainer)
        finally:
            self.log, self.tokens = trainer.state.log_history, trainer.state.num_input_tokens_seen


def _refuse_adapted_vision(model: Any) -> None:
    """Raise UsageError where LoRA has landed on the vision tower that is to be frozen, or on the connector, as plain
    names of modules make it: vLLM would leave that out with a warning."""
    meta = model.model_meta
    seeing = ("vision_tower", "aligner") if meta.is_multimodal else ()
    towers = [module for part in seeing for module in getattr(meta.model_arch, part, None) or []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(f".{tower}." in f".{name}" for tower in towers):
            raise UsageError(
                f"train.target_modules puts LoRA on the vision tower, too, or on its connector ({name}), which"
                " train.freeze_vision leaves as it is: take [all-linear], or a regular expression that names the"
                " language model's modules; or --set train.freeze_vision=false together with --set infer.merged=true"
            )


def _picture(path: Path, sample: str) -> Path:
    """The file, if it is one: ms-swift takes a name without a file for the picture itself, in base64."""
    try:
        with Image.open(path):
            return path
    except (FileNotFoundError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: no picture, and sample {sample} needs it; run preprocess again") from error


def _load_picture(rules: Rules, budget: int | None, picture: Any, load: bool = True) -> Any:
    """A picture at the size at which inference reads it.

    ms-swift's own way ends above the budget: it shrinks to it and then rounds both sides to the nearest multiple.
    """
    name = picture.get("path") if isinstance(picture, dict) else picture
    return open_picture(Path(name), rules, budget).load() if isinstance(name, str) else picture


def _with_micro_batch(training_loop: Any, micro_batch: int) -> Any:
    def loop(batch_size: int | None = None, **others: Any) -> Any:
        return training_loop(batch_size=micro_batch, **others)

    return loop


def _evaluate_apart(trainer: Any, evaluate: Any, progress: Progress, *arguments: Any, **named: Any) -> Any:
    """Evaluate so that training is as if it had not been: the checkpoint of this step is saved before, in case that the
    evaluation runs out of memory, and the random state is afterwards what it was."""
    if trainer.control.should_save:
        trainer._save_checkpoint(trainer.model, None)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    progress.during = "evaluation"
    with _random_state_kept():
        metrics = evaluate(*arguments, **named)
    progress.during = "training"
    return metrics


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numbers = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)


class _TokenCount:
    """Counts the tokens of a step as its micro-batches are put together, still in the processor's memory.

    The trainer puts together the micro-batches of one step, and only those, before it begins it.
    """

    def __init__(self, collate: Any, progress: Progress) -> None:
        self._collate, self._progress = collate, progress
        self._tokens = 0

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._collate(samples)
        if self._progress.during == "training":
            mask = batch.get("attention_mask")
            # a mask that a model makes itself says nothing: padding is counted then
            self._tokens += int(batch["input_ids"].numel() if mask is None or mask.dim() != 2 else mask.sum())
        return batch

    def take(self) -> int:
        """The tokens since the last time."""
        tokens, self._tokens = self._tokens, 0
        return tokens


class _Checkpoints(TrainerCallback):
    """Marks checkpoints as whole and deletes those that are too many, reports progress, and turns a stop into a saved
    checkpoint."""

    def __init__(self, job: Job, progress: Progress, stop: StopRequest, together: Together, count: _TokenCount) -> None:
        self._job, self._progress, self._stop, self._together, self._count = job, progress, stop, together, count
        self._since = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.during, self._progress.step = "training", state.global_step
        # a checkpoint is saved before the evaluation at its step: going on from it, that is still to be done
        every, last = int(args.eval_steps or 0), state.global_step >= state.max_steps
        if args.eval_strategy != "no" and state.global_step and (last or state.global_step % every == 0):
            args.eval_on_start = not any(
                "eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history
            )
        self._since = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark_whole(state)
        self._since = time.monotonic()

    def _mark_whole(self, state: TrainerState) -> None:
        checkpoint = self._job.work / f"checkpoint-{state.global_step}"
        # each process has put its random state there, and the first may not yet see those of other machines
        random_states = self._together.of_all(_saved(checkpoint / f"rng_state_{self._together.rank}.pth"))
        if not self._together.first:
            return
        remove(checkpoint / "complete.json")
        # what nobody reads; but additional_config.json says that there is LoRA+, for ms-swift when it goes on
        for name in ("args.json", "README.md", "training_args.bin"):
            remove(checkpoint / name)
        for path in checkpoint.iterdir():  # on the disk before the mark is: a power cut must not leave a mark alone
            _sync(path)
        sizes = file_sizes(checkpoint)
        for state_of_one in random_states:
            sizes |= state_of_one
        write_json(checkpoint / "complete.json", {"sizes": dict(sorted(sizes.items()))})
        older = [path for path in self._job.work.glob("checkpoint-*") if _step_of(path) < state.global_step]
        for path in sorted(older, key=_step_of, reverse=True)[self._job.settings.keep_checkpoints - 1 :]:
            remove(path)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        stops, tokens = self._together.sums(int(self._stop.signal is not None), self._count.take())
        state.num_input_tokens_seen += tokens  # the trainer does not count; this way checkpoints keep it
        now = time.monotonic()
        self._progress.step = state.global_step
        self._progress.send(
            event="step",
            step=state.global_step,
            total=state.max_steps,
            tokens=tokens,
            seconds=now - self._since,
            memory=None if self._job.use_cpu else torch.cuda.max_memory_reserved(),
        )
        self._since = now
        if state.global_step >= state.max_steps:  # whatever log_every is, how it ended is told
            control.should_log = True
        if stops or state.global_step >= state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        if stops:  # there may be little time; the next start evaluates
            control.should_evaluate = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since = time.monotonic()

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
            self._progress.send(event="loss", step=state.global_step, loss=float(loss))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


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


class _WeightsLetGo(TrainerCallback):
    """ZeRO-3, after each batch of an evaluation."""

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        let_go_of_weights(named["model"])
