"""The ladder: what the next attempt changes after training ran out of memory, and the file that records it.

Each rung is one change that lowers memory use and keeps the effective batch. Pixels and length decide what the adapter
learns from, so Lorry lowers them only if the recipe allows it. If an evaluation runs out of memory, only the evaluation
changes.

    <checkpoints>/ladder.json   the rungs so far; a later start of the same training applies them first
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

from stages.contract.errors import DoesNotFitError, InterruptedRunError
from stages.contract.files import read_json, write_json
from stages.contract.recipe import Train
from stages.hardware.step import StepPlan, count_samples

During = Literal["loading", "training", "evaluation"]

WHAT = "out of memory"
"""The name of these decisions in the manifest."""


@dataclass(frozen=True)
class Shortage:
    """An out-of-memory error, as a training process reports it."""

    during: During
    step: int
    """Number of the last finished optimizer step."""
    said: str
    """Memory requested and memory free, as torch reports them."""
    one_by_one: bool = False
    """Whether each pass had one sample: fewer tokens a pass change nothing then."""

    def __str__(self) -> str:
        """When memory ran out, and how much was requested and free, as a message has it after `out of memory`."""
        at = "while loading the model" if self.during == "loading" else f"in {self.during} after step {self.step}"
        return f"{at} ({self.said})"


class MemoryRanOutError(DoesNotFitError):
    """Training ran out of GPU memory. `processes` are the ids of the training processes, which have ended, and
    `earlier_jobs` is the number of adapters that they had trained before."""

    def __init__(self, text: str, shortage: Shortage, processes: tuple[int, ...] = (), earlier_jobs: int = 0) -> None:
        super().__init__(text)
        self.shortage, self.processes, self.earlier_jobs = shortage, processes, earlier_jobs


class LostCardError(InterruptedRunError):
    """A GPU stopped working. Training can resume from the last checkpoint, also on other GPUs."""


@dataclass(frozen=True)
class Attempt:
    """The settings of one attempt at a training that depend on the memory."""

    settings: Train
    step: StepPlan
    evaluation_tokens: int
    """Most tokens of a pass of an evaluation, unless one sample is longer."""
    longest: int
    """Tokens of the longest sample: a pass cannot hold fewer."""
    layers: int = 0
    """Number of decoder layers; 0 if the model's shape is unknown."""
    evaluate: bool = True
    """Whether to evaluate during training."""


Change = dict[str, int | bool]
"""What a rung sets: `pass_tokens`, `checkpointed_layers`, `evaluation_tokens`, `evaluate`, or a field of the recipe's
`train`."""

REPLACED = ("micro_batch", "eval_micro_batch")
"""What rungs of earlier versions set: samples of a pass. They do not apply to passes of packed samples."""


def next_rung(attempt: Attempt, during: During, one_by_one: bool = False) -> Change | None:
    """The next change that lowers memory use; None if no change is left that the recipe allows.

    `during` is what the process was doing when memory ran out. No change helps while the model is loading.
    `one_by_one`: whether each pass had one sample.
    """
    if during == "evaluation":
        return _next_evaluation_change(attempt, one_by_one)
    if during == "training":
        return _next_training_change(attempt, one_by_one)
    return None  # while loading, no sample is on the GPU yet: a shorter pass frees nothing


def _next_training_change(attempt: Attempt, one_by_one: bool) -> Change | None:
    """The mildest change that makes training need less memory; None if none is left that the recipe allows."""
    settings, step = attempt.settings, attempt.step
    if step.pass_tokens > attempt.longest and not one_by_one:
        return {"pass_tokens": max(step.pass_tokens // 2, attempt.longest)}
    if not settings.gradient_checkpointing:
        if attempt.layers == 0:
            return {"gradient_checkpointing": True}
        more = (ceil(attempt.layers * quarter / 4) for quarter in range(1, 5))
        layers = next((number for number in more if number > step.checkpointed_layers), None)
        if layers is not None:
            return {"checkpointed_layers": layers}
    if settings.least_max_pixels and settings.max_pixels and settings.max_pixels > settings.least_max_pixels:
        return {"max_pixels": max(settings.max_pixels * 2 // 3, settings.least_max_pixels)}
    if settings.least_max_length and settings.max_length > settings.least_max_length:
        return {"max_length": max(settings.max_length // 2, settings.least_max_length)}
    return None


def _next_evaluation_change(attempt: Attempt, one_by_one: bool) -> Change | None:
    """The next change of the evaluation: half the tokens of a pass, down to the longest sample, then no evaluation.

    None if it is already off.
    """
    if attempt.evaluation_tokens > attempt.longest and not one_by_one:
        return {"evaluation_tokens": max(attempt.evaluation_tokens // 2, attempt.longest)}
    return {"evaluate": False} if attempt.evaluate else None


def lowered_attempt(attempt: Attempt, change: Change) -> Attempt:
    """The attempt with a rung's change. A value that is already lower stays: other GPUs may start lower."""
    step, settings = attempt.step, attempt.settings
    update: Change = {}
    if "gradient_checkpointing" in change:
        update["gradient_checkpointing"] = True
    if "max_pixels" in change:
        update["max_pixels"] = min(settings.max_pixels or int(change["max_pixels"]), int(change["max_pixels"]))
    if "max_length" in change:
        update["max_length"] = min(settings.max_length, int(change["max_length"]))
    settings = settings.model_copy(update=update)
    longest = min(attempt.longest, settings.max_length)
    # no pass needs more tokens than before: with shorter samples, the longest one was the limit
    most = step.pass_tokens if longest == attempt.longest else longest
    layers = max(step.checkpointed_layers, int(change.get("checkpointed_layers", 0)))
    return replace(
        attempt,
        settings=settings,
        step=replace(
            step,
            pass_tokens=min(most, int(change.get("pass_tokens", most))),
            checkpointed_layers=attempt.layers if settings.gradient_checkpointing else min(layers, attempt.layers),
        ),
        evaluation_tokens=min(
            attempt.evaluation_tokens, int(change.get("evaluation_tokens", attempt.evaluation_tokens))
        ),
        longest=longest,
        evaluate=attempt.evaluate and bool(change.get("evaluate", True)),
    )


def describe_change(change: Change, after: Attempt) -> str:
    """A rung's change in words, for console, manifest and report. `after` is the attempt that has the change."""
    step = after.step
    still = f"still {count_samples(step.effective_batch)} a step"
    words = {
        "pass_tokens": f"passes of at most {step.pass_tokens:,} tokens, {still}",
        "checkpointed_layers": f"{step.checkpointed_layers} of {after.layers} layers checkpointed, {still}",
        "gradient_checkpointing": f"gradient checkpointing on, {still}",
        "max_pixels": f"max_pixels {after.settings.max_pixels}",
        "max_length": f"max_length {after.settings.max_length}: longer samples are skipped",
        "evaluation_tokens": f"evaluation in passes of at most {after.evaluation_tokens:,} tokens; training unchanged",
        "evaluate": "no evaluation; training unchanged",
    }
    return "; ".join(words[name] for name in change)


def memory_advice(attempt: Attempt) -> str:
    """What the user can change if no rung is left, as the cure in an error message."""
    settings = attempt.settings
    ways = ["GPUs with more free memory"]
    if not (settings.load_in_4bit or settings.trains_connector):
        ways.append("the base in 4 bits (train.load_in_4bit=true)")
    if not settings.trains_connector:
        ways.append("ZeRO-3 over more GPUs (train.sharding=zero3)")
    if settings.max_pixels and settings.max_pixels > (settings.least_max_pixels or 0):
        ways.append(f"fewer pixels (train.max_pixels below {settings.max_pixels})")
    ways.append(f"shorter samples ({settings.full_key('max_length')} below {settings.max_length})")
    return f"use {', '.join(ways[:-1])}, or {ways[-1]}"


@dataclass
class Ladder:
    """The rungs of one adapter's training, over all its starts."""

    path: Path
    rungs: list[dict[str, Any]] = field(default_factory=list)
    """`{"decision": as in the manifest, "change": Change, "room": as below}`"""
    room: int = 0
    """Total memory of the smallest GPU, in bytes; 0 on a CPU. A rung of a start with smaller GPUs does not apply."""
    ignored: list[dict[str, Any]] = field(default_factory=list)
    """Rungs of earlier versions that set something REPLACED."""

    @staticmethod
    def read(work: Path, room: int = 0) -> "Ladder":
        """Read the ladder of the adapter whose checkpoints are in `work`. Without a ladder.json, it has no rungs."""
        path = work / "ladder.json"
        found = (read_json(path) or {"rungs": []})["rungs"]
        ignored = [rung for rung in found if any(name in REPLACED for name in rung["change"])]
        return Ladder(path, [rung for rung in found if rung not in ignored], room, ignored)

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """The rungs as decisions of the manifest: `{"what", "value", "why"}` each."""
        return [dict(rung["decision"]) for rung in self.rungs]

    def apply_rungs(self, attempt: Attempt) -> Attempt:
        """The attempt with the change of every rung that applies to these GPUs."""
        for rung in self.rungs:
            if self.room <= rung["room"]:
                attempt = lowered_attempt(attempt, rung["change"])
        return attempt

    def add_rung(self, adapter: str, shortage: Shortage, change: Change, attempt: Attempt) -> Attempt:
        """Apply a change and record it as a rung in ladder.json. Returns the next attempt."""
        after = lowered_attempt(attempt, change)
        decision = {"what": WHAT, "value": describe_change(change, after), "why": f"adapter {adapter}, {shortage}"}
        self.rungs.append({"decision": decision, "change": change, "room": self.room})
        write_json(self.path, {"rungs": self.rungs})
        return after


# -- in the training process -------------------------------------------------------------------------------------

_NO_MEMORY = re.compile(
    r"CUDA out of memory|CUDA (?:driver )?error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|NCCL.*out of memory|Cuda failure.*out of memory|DefaultCPUAllocator: can't allocate memory",
    re.DOTALL,
)
"""Texts of RuntimeErrors that mean out of memory. Only torch's allocator raises a type of its own."""

_LOST = re.compile(
    r"unspecified launch failure|GPU is lost|fallen off the bus|uncorrectable ECC|no CUDA-capable device"
    r"|CUDA error: (?:unknown error|an illegal instruction|hardware stack error|system not yet initialized)"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|device kernel image is invalid",
    re.IGNORECASE,
)
"""CUDA's messages for a GPU that stopped working. A device-side assertion is not among them: it is a bug."""


def find_shortage(error: BaseException, during: During, step: int) -> Shortage | None:
    """Find an out-of-memory error in an error or its causes. Returns it as a shortage; None if there is none.

    `during` is what the process was doing, `step` the number of its last finished optimizer step.
    """
    for one in _error_chain(error):
        if type(one).__name__ == "OutOfMemoryError" or (isinstance(one, RuntimeError) and _NO_MEMORY.search(str(one))):
            return Shortage(during, step, _requested_memory(str(one)))
    return None


def lost_gpu_message(error: BaseException) -> str | None:
    """The first line of CUDA's message that a GPU stopped working, at most 200 characters; None if there is none.

    Searches an error and its causes.
    """
    for one in _error_chain(error):
        if isinstance(one, RuntimeError) and _LOST.search(str(one)):
            return str(one).strip().splitlines()[0][:200]
    return None


def _error_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then its cause or the error that was being handled when it was raised, and so on."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _requested_memory(text: str) -> str:
    """Memory requested and free in torch's error text, as `asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free`.

    If the text does not say how much was requested, returns its first 150 characters. If it does not say how much is
    free, leaves that out.
    """
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    free = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
    if asked is None:
        return " ".join(text.split())[:150]
    return f"asked for {asked[1]}" + (f", {free[2]} of {free[1]} free" if free else "")
