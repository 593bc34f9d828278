"""ms-swift's fine-tuning with Lorry's additions: it marks complete checkpoints, saves one on a stop, checks prompts."""

import copy
import importlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import PeftModel
from PIL import Image
from swift.pipelines.train.sft import SwiftSft
from swift.template.base import MaxLengthError
from transformers import BatchFeature, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.contract.errors import DataError, UsageError
from stages.contract.files import remove, write_json
from stages.contract.records import PLACE, Message
from stages.contract.stop import StopRequest
from stages.models import gptq, mgm
from stages.models.control_words import ControlWords
from stages.models.end_tokens import end_tokens
from stages.models.pictures import (
    PictureRules,
    Rules,
    SquareRules,
    family_rules,
    open_picture,
    picture_size,
    read_picture,
)
from stages.models.rendering import UNLEARNT, Renderer, hidden_content
from stages.train import llava_templates  # noqa: F401 - registers templates
from stages.train.connector_sft import patch_connector_training
from stages.train.job import Job, Progress, file_sizes
from stages.train.losses import Losses
from stages.train.optimizer_state import patch_state_saving
from stages.train.sharding import convert_trainable_weights, gather_by_layer
from stages.train.together import Together

if mgm.AVAILABLE:
    from stages.train import mgm_swift  # noqa: F401 - registers the model and its template

# Read a checkpoint's adapter into the CPU's memory. PEFT's default is "cuda", which safetensors reads as GPU 0: every
# process that resumes would hold memory there.
PeftModel.load_adapter = partialmethod(  # type: ignore[assignment, method-assign]
    PeftModel.load_adapter, torch_device="cpu"
)


_Sequence = tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]
"""Tokens and labels of a sample without pictures."""

READ_BY_SWIFT = (PLACE, "<img>")
"""Texts that ms-swift's templates take for a picture wherever they occur; a file name follows `<img>`."""


class LorrySft(SwiftSft):  # type: ignore[misc]
    """`swift sft` for one job."""

    def __init__(
        self, arguments: list[str], job: Job, progress: Progress, stop: StopRequest, together: Together
    ) -> None:
        """Load the model. `arguments` are those of the command `swift sft`."""
        with gptq.patch_gptq_kernels(job.model, on_card=not job.use_cpu, training=True):
            super().__init__(arguments)
        self._job, self._progress, self._stop, self._together = job, progress, stop, together
        self._renderer = Renderer(job.model, job.chat)
        self._words = ControlWords(self.template.tokenizer, READ_BY_SWIFT)
        self.template._tokenize = partial(_encode_template_text, self._words)
        self._sequences: list[_Sequence] = []
        self.template._encode = partial(_encode_row, self._sequences, self.template._encode)
        self._rules = family_rules(job.model)
        self.template._load_image = partial(_load_picture, self._rules, job.settings.max_pixels)
        if self._rules is not None:
            # the later steps of ms-swift must keep this size: turn off its own budget and its minimum of four tokens
            self.template.max_pixels = None
        if isinstance(self._rules, PictureRules):
            picture_utils: Any = importlib.import_module("qwen_vl_utils.vision_process")
            picture_utils.IMAGE_MIN_TOKEN_NUM = 1
        self.log: list[dict[str, Any]] = []
        """The trainer's log of all steps, set by `train`."""
        self.tokens = 0
        """Tokens of all steps without padding, set by `train`."""
        self.skipped_steps = 0
        """Steps that float16's loss scale skipped, set by `train`."""
        self.said: list[Counter[str]] = []
        """How often each control word occurs as text in each fitting sample. `fitting_samples` adds to it."""

    def fitting_samples(self, samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        """The samples of at most max_length tokens as rows with only ms-swift's fields, and the ids of the others.

        A sample without pictures is rendered here, as inference renders it; its row has the number of its tokens in
        memory in place of its messages. It has several rows if its answers need several sequences. ms-swift's template
        renders a sample with pictures. Raises UsageError if that template renders another prompt than the model's chat
        template, which inference uses: the adapter would learn prompts that it never gets. The check compares the first
        sample with a picture, if Lorry can count the tokens of the model's pictures.

        Adds the fitting samples' control words to `said`. Raises DataError for a file that is not a picture, and for a
        sample without an answer to learn.
        """
        with self._use_blank_pictures():
            return self._split_by_length(samples)

    def _split_by_length(self, samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        """The samples of at most max_length tokens, and the ids of the others. Returns and raises as
        `fitting_samples`."""
        kept: list[dict[str, Any]] = []
        left_out: list[str] = []
        compared = self._rules is None
        for sample in samples:
            name, files = str(sample["id"]), [self._job.run / name for name in sample.get("images") or []]
            messages = self._renderer.template.folded(sample["messages"])
            if not files:
                rows = self._text_rows(name, messages)
            else:
                row = self._picture_row(name, messages, files)
                try:
                    encoded = self._encode_sample(row)
                except MaxLengthError:
                    rows = []
                else:
                    if all(label == UNLEARNT for label in encoded["labels"]):
                        raise DataError(f"sample {name}: has no answer to learn; run preprocess again")
                    if not compared:
                        self._check_prompt(name, messages, files, encoded)
                        compared = True
                    rows = [row]
            if not rows:
                left_out.append(name)
                continue
            kept += rows
            self.said.append(self._renderer.control_words_in(messages, bool(files)))
        return kept, left_out

    def _text_rows(self, sample: str, messages: list[Message]) -> list[dict[str, Any]]:
        """The rows of a sample without pictures, whose tokens stay in memory; empty if one is longer than max_length.

        Raises DataError if the sample has no answer to learn, and the errors of `Renderer.training_sequences`.
        """
        sequences = self._renderer.training_sequences(messages)
        if not sequences:
            raise DataError(f"sample {sample}: has no answer to learn; run preprocess again")
        if any(len(sequence.tokens) > self._job.settings.max_length for sequence in sequences):
            return []
        rows = []
        for sequence in sequences:
            number = {"role": "user", "content": str(len(self._sequences))}
            rows.append({"messages": [number, {"role": "assistant", "content": "-"}]})
            tokens, labels = (numpy.array(values, numpy.int32) for values in (sequence.tokens, sequence.labels))
            self._sequences.append((tokens, labels))
        return rows

    def _picture_row(self, sample: str, messages: list[Message], files: list[Path]) -> dict[str, Any]:
        """The row of a sample with pictures. Raises DataError for a file that is not a picture."""
        contents = [hidden_content(self._words, message, has_pictures=True) for message in messages]
        roles = [message["role"] for message in messages]
        return {
            "messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)],
            "images": [str(_check_picture(file, sample)) for file in files],
        }

    @contextmanager
    def _use_blank_pictures(self) -> Iterator[None]:
        """Within this context, the processor of a LLaVA or MGM returns a prepared blank picture for every picture.
        Resizing each blank picture would take minutes for ten thousand samples. Does nothing for other models."""
        if not isinstance(self._rules, SquareRules):
            yield
            return
        processor = self.template.processor
        real = processor.image_processor
        blank = real(images=[Image.new("RGB", (self._rules.factor, self._rules.factor))], return_tensors="pt")

        def blank_output(images: list[Any], **_: Any) -> BatchFeature:
            """Return the processor's output for blank pictures, as many as there are in `images`."""
            return BatchFeature({name: one.expand(len(images), *one.shape[1:]) for name, one in blank.items()})

        processor.image_processor = blank_output
        try:
            yield
        finally:
            processor.image_processor = real

    def _encode_sample(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode the row of a sample with pictures. Raises MaxLengthError if it is longer than max_length.

        If Lorry can count a picture's tokens from its size, a blank picture of one patch replaces it, and no pixel is
        read.
        """
        row = copy.deepcopy(row)  # the template replaces the names with the opened pictures
        if self._rules is None:
            encoded: dict[str, Any] = self.template.encode(row)
            return encoded
        pictures = [open_picture(Path(name), self._rules, self._job.settings.max_pixels) for name in row["images"]]
        blank = Image.new("RGB", (self._rules.factor, self._rules.factor))
        encoded = self.template.encode({**row, "images": [blank] * len(pictures)})
        length = len(encoded["input_ids"]) + sum(picture.tokens - self._blank_tokens for picture in pictures)
        if length > self._job.settings.max_length:
            raise MaxLengthError(f"{length} tokens")
        return encoded

    @property
    def _blank_tokens(self) -> int:
        """Number of tokens of a blank picture of one patch; 0 if Lorry does not know the model's rules for pictures."""
        return self._rules.tokens(self._rules.factor, self._rules.factor) if self._rules else 0

    def _check_prompt(
        self, sample: str, messages: list[Message], pictures: list[Path], encoded: dict[str, Any]
    ) -> None:
        """Raise UsageError if ms-swift's prompt differs from inference's, or its answer lacks the model's end token.

        Each picture counts as a blank one in both prompts. Raises DataError if the sample cannot be rendered.
        """
        tokens, labels = list(encoded["input_ids"]), list(encoded["labels"])
        prompt = next(i for i, label in enumerate(labels) if label != UNLEARNT)
        swifts = tokens[:prompt]
        try:
            # up to the first answer: the adapter learns every answer of a conversation
            asked = list(takewhile(lambda message: message["role"] != "assistant", messages))
            shown = pictures[: sum(message["content"].count(PLACE) for message in asked)]
            rendered = self._renderer.render(sample, asked, shown)
            own = rendered.repeat_placeholders([self._blank_tokens] * len(shown), self._renderer.picture_token)
        except DataError as error:
            raise DataError(f"sample {sample}: {error}") from error
        if swifts != own:
            raise UsageError(
                f"model.swift_template: {self._job.model_settings.swift_template!r} renders a different prompt from"
                f" the chat template in {self._job.model} ({self.tokenizer.decode(swifts)[:300]!r} instead of"
                f" {self.tokenizer.decode(own)[:300]!r}); set it to the template that matches"
            )
        ends = end_tokens(self._job.model, self.tokenizer)
        if not set(ends) & set(labels[prompt:]):
            raise UsageError(
                f"model.swift_template: {self._job.model_settings.swift_template!r} ends the answer without the model's"
                f" end token {self.tokenizer.decode(ends[-1:])!r}, so the tuned model would never stop; set it to the"
                " template that matches"
            )

    def train(self, trainer: Any) -> Any:
        """Train with Lorry's patches of ms-swift's trainer. Returns what `swift sft` returns.

        Sets `log`, `tokens` and `skipped_steps`. Raises UsageError if the base has no connector to train, if LoRA is on
        a vision tower that the recipe freezes, or if training diverges.
        """
        if self._job.settings.trains_connector:
            patch_connector_training(trainer, self._job.model, self._together)
        elif self._job.settings.freeze_vision:
            _refuse_adapted_vision(trainer.model)
        count = _TokenCount(trainer.data_collator, self._progress)
        trainer.data_collator = count.collate
        losses = Losses(trainer, self._job, self._together)
        trainer.add_callback(_Checkpoints(self._job, self._progress, self._stop, self._together, count, losses))
        # the trainer would delete the last complete checkpoint before the new one is marked; _Checkpoints does it later
        trainer.args.save_total_limit = None
        trainer._evaluate = partial(_evaluate_without_side_effects, trainer, losses, self._progress)
        # transformers 4 uses the micro-batch of the checkpoint that it resumes from, which may be larger
        trainer._inner_training_loop = _loop_with_micro_batch(trainer._inner_training_loop, self._job.micro_batch)
        if self._job.sharding != "none":
            convert_trainable_weights(self._job.dtype, trainer.model)
        if self._job.sharding == "zero3":
            settings = self._job.settings
            # the input of a vision tower's first layer is a picture, which requires no gradient
            gather_by_layer(trainer.model, settings.gradient_checkpointing and settings.freeze_vision)
        patch_state_saving(trainer, self._together)
        result = super().train(trainer)
        self.log, self.tokens = trainer.state.log_history, trainer.state.num_input_tokens_seen
        # the optimizer counts the updates that it made; a checkpoint saves the count
        updates = max((int(state["step"]) for state in trainer.optimizer.state.values()), default=0)
        self.skipped_steps = trainer.state.global_step - updates
        return result


def _refuse_adapted_vision(model: Any) -> None:
    """Raise UsageError if the vision tower or the connector got LoRA although the recipe freezes them.

    Plain module names in train.target_modules can match them too, and vLLM would ignore these weights with only a
    warning.
    """
    meta = model.model_meta
    seeing = ("vision_tower", "aligner") if meta.is_multimodal else ()
    towers = [module for part in seeing for module in getattr(meta.model_arch, part, None) or []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(f".{tower}." in f".{name}" for tower in towers):
            raise UsageError(
                f"train.target_modules: also matches {name}, in the vision tower or connector, which"
                " train.freeze_vision freezes; set it to [all-linear] or to a regular expression that matches only the"
                " language model, or set train.freeze_vision=false and infer.merged=true"
            )


def _encode_row(sequences: "list[_Sequence]", encode: Any, inputs: Any) -> dict[str, Any]:
    """The tokens and labels of a row: those in memory or, for a row with pictures, those of ms-swift's template.

    Replaces `Template._encode`; `encode` is the method that it replaces.
    """
    if inputs.images:
        encoded: dict[str, Any] = encode(inputs)
        return encoded
    tokens, labels = sequences[int(inputs.messages[0]["content"])]
    return {"input_ids": tokens.tolist(), "labels": labels.tolist()}


def _encode_template_text(words: ControlWords, text: str, **_: Any) -> list[int]:
    """The tokens of a piece of text from ms-swift's template. The template's control words become single tokens;
    those in a sample's messages are encoded as text."""
    return words.encode(text)


def _check_picture(path: Path, sample: str) -> Path:
    """Return `path` if the file is a picture. Raises DataError if it is missing or not a picture.

    ms-swift would take the name of a missing file for a picture in base64.
    """
    try:
        picture_size(path)
    except DataError as error:
        raise DataError(
            f"{path}: missing or not a picture, but sample {sample} needs it; run preprocess again"
        ) from error
    return path


def _load_picture(rules: Rules | None, budget: int | None, picture: Any, load: bool = True) -> Any:
    """The picture at the size that inference uses, within `budget` pixels (None: the model's own budget).

    If Lorry does not know the model's rules, the picture keeps its own size. `picture` is returned unchanged if it
    names no file, or if the rules are unknown and the template reads the file itself (`load` is false).

    Replaces ms-swift's method, whose result may exceed the budget: it rounds both sides after scaling.
    """
    name = picture.get("path") if isinstance(picture, dict) else picture
    if not isinstance(name, str) or (rules is None and not load):
        return picture
    return read_picture(Path(name)) if rules is None else open_picture(Path(name), rules, budget).load()


def _loop_with_micro_batch(training_loop: Any, micro_batch: int) -> Any:
    """Return the trainer's training loop with a fixed micro-batch."""

    def loop(batch_size: int | None = None, **others: Any) -> Any:
        """Run the training loop with `micro_batch`, whatever batch size the trainer passes."""
        return training_loop(batch_size=micro_batch, **others)

    return loop


def _evaluate_without_side_effects(
    trainer: Any, losses: Losses, progress: Progress, *_: Any, **__: Any
) -> dict[str, float]:
    """Evaluate in a way that does not affect training. Returns the metrics.

    Saves this step's checkpoint first if one is due, because the evaluation may run out of memory, and restores the
    random state afterwards. Raises UsageError if the validation loss is not finite.
    """
    if trainer.control.should_save:
        trainer._save_checkpoint(trainer.model, None)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    progress.during = "evaluation"
    with _restore_random_state():
        metrics = losses.validate()
    progress.during = "training"
    return metrics


@contextmanager
def _restore_random_state() -> Iterator[None]:
    """At the end of this context, restore the random state of Python, numpy and torch."""
    python, numbers = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)


class _TokenCount:
    """Counts the tokens of a step while its micro-batches are collated in the CPU's memory.

    The trainer collates exactly the micro-batches of one step before the step starts.
    """

    def __init__(self, collate: Any, progress: Progress) -> None:
        self._collate, self._progress = collate, progress
        self._tokens = 0

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate samples into a micro-batch. Counts its tokens if it is for training."""
        batch: dict[str, Any] = self._collate(samples)
        if self._progress.during == "training":
            mask = batch.get("attention_mask")
            # without a two-dimensional mask, padding cannot be distinguished from tokens and is counted too
            self._tokens += int(batch["input_ids"].numel() if mask is None or mask.dim() != 2 else mask.sum())
        return batch

    def take_tokens(self) -> int:
        """Return the number of tokens since the last call, and start to count from 0 again."""
        tokens, self._tokens = self._tokens, 0
        return tokens


class _Checkpoints(TrainerCallback):
    """Marks complete checkpoints, deletes the oldest, sends progress, and saves a checkpoint on a stop.

    transformers calls its methods (https://huggingface.co/docs/transformers/main_classes/callback).
    """

    def __init__(
        self,
        job: Job,
        progress: Progress,
        stop: StopRequest,
        together: Together,
        count: _TokenCount,
        losses: Losses,
    ) -> None:
        self._job, self._progress, self._stop, self._together = job, progress, stop, together
        self._count, self._losses = count, losses
        self._since = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock. Have the trainer evaluate first if the last start ended after saving the checkpoint, but
        before the evaluation at the same step."""
        self._progress.during, self._progress.step = "training", state.global_step
        self._losses.begin()
        # a checkpoint is saved before the evaluation at its step, which may be missing when training resumes
        every, last = int(args.eval_steps or 0), state.global_step >= state.max_steps
        if args.eval_strategy != "no" and state.global_step and (last or state.global_step % every == 0):
            args.eval_on_start = not any(
                "eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history
            )
        self._since = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the new checkpoint as complete, and start the clock again: the time of saving counts for no step."""
        self._mark_complete(state)
        self._since = time.monotonic()

    def _mark_complete(self, state: TrainerState) -> None:
        """Flush this step's checkpoint to the disk, write its complete.json, and delete the oldest checkpoints.

        train.keep_checkpoints checkpoints are left. Every process flushes its own random state; the first process does
        the rest. All processes must call this.
        """
        checkpoint = self._job.work / f"checkpoint-{state.global_step}"
        # each process wrote its random state; the first process may not see the files of other machines yet
        random_states = self._together.gather(_flush_file(checkpoint / f"rng_state_{self._together.rank}.pth"))
        if not self._together.is_first:
            return
        remove(checkpoint / "complete.json")
        # files that nobody reads; ms-swift reads LoRA+ from additional_config.json when it resumes, so that stays
        for name in ("args.json", "README.md", "training_args.bin"):
            remove(checkpoint / name)
        for path in checkpoint.iterdir():  # flush before the mark: a power cut must not leave a mark without its files
            _sync(path)
        sizes = file_sizes(checkpoint)
        for state_of_one in random_states:
            sizes |= state_of_one
        write_json(checkpoint / "complete.json", {"sizes": dict(sorted(sizes.items()))})
        older = [path for path in self._job.work.glob("checkpoint-*") if _step_number(path) < state.global_step]
        for path in sorted(older, key=_step_number, reverse=True)[self._job.settings.keep_checkpoints - 1 :]:
            remove(path)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Keep the step's learning rate for the log."""
        self._losses.note_learning_rate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Send the step's progress. Have the trainer save a checkpoint and end after the last step, or if any process
        is asked to stop.

        Raises UsageError if the loss or the gradient norm is not finite or, when a checkpoint is due, a weight.
        """
        stops, tokens, loss, learnt = self._together.sums(
            int(self._stop.signal is not None), self._count.take_tokens(), *self._losses.take_sums()
        )
        self._losses.end_step(loss, learnt, state)
        state.num_input_tokens_seen += int(tokens)  # the trainer does not count them; checkpoints save this
        now = time.monotonic()
        self._progress.step = state.global_step
        self._progress.send(
            event="step",
            step=state.global_step,
            total=state.max_steps,
            tokens=int(tokens),
            seconds=now - self._since,
            memory=None if self._job.use_cpu else torch.cuda.max_memory_reserved(),
        )
        self._since = now
        if state.global_step >= state.max_steps:  # log the last step whatever log_every is
            control.should_log = True
        if stops or state.global_step >= state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        if stops:  # there may be no time for an evaluation; the next start evaluates
            control.should_evaluate = False
        if control.should_save:
            self._losses.check_weights(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock again: the time of an evaluation counts for no step."""
        self._since = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Send the training loss, if the log has one."""
        loss = (logs or {}).get("loss")
        if loss is not None:
            self._progress.send(event="loss", step=state.global_step, loss=float(loss))


def _step_number(checkpoint: Path) -> int:
    """The step in the name of a checkpoint, `checkpoint-<step>`."""
    return int(checkpoint.name.rpartition("-")[2])


def _sync(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_file(path: Path) -> dict[str, int]:
    """Flush a file to the disk. Returns `{its name: its size in bytes}`; empty if the file does not exist."""
    if not path.is_file():
        return {}
    _sync(path)
    return {path.name: path.stat().st_size}
