"""The interface of engines. An engine loads base and adapters once. It completes prompts of tokens and pictures, and
computes the loss of given answers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from stages.models.pictures import Picture
from stages.models.rendering import UNLEARNT, Prompt, TrainingSequence


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt."""

    text: str
    tokens: int
    """Number of tokens, without the end token."""
    finish_reason: str
    """`stop` after an end token, `length` at the limit of tokens."""


Done = Callable[[int, Completion], None]
"""A function that the engine calls for each finished completion, with the index of its prompt in the list."""


@dataclass(frozen=True)
class GivenAnswer:
    """A conversation with its answers, as training reads it."""

    sample_id: str
    sequence: TrainingSequence
    """Its tokens, with one placeholder for each picture, and the labels of those that count."""
    pictures: tuple[Picture, ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens, including those of the pictures."""
        return len(self.sequence.tokens) + sum(picture.tokens - 1 for picture in self.pictures)

    @property
    def learnt(self) -> int:
        """Number of tokens that count. A first token never does: nothing before it predicts it."""
        return sum(label != UNLEARNT for label in self.sequence.labels[1:])

    def whole_sequence(self, placeholder: int) -> TrainingSequence:
        """The sequence with each picture's `placeholder` repeated once per token of the picture."""
        if not self.pictures:
            return self.sequence
        return self.sequence.repeat_placeholders([picture.tokens for picture in self.pictures], placeholder)


DoneLoss = Callable[[int, float], None]
"""A function that the engine calls for each computed loss, with the index of its answer in the list."""


def predicted_places(sequence: TrainingSequence) -> list[int]:
    """The places of the tokens that count, in order; never the first, which nothing predicts."""
    return [place for place, label in enumerate(sequence.labels) if place and label != UNLEARNT]


Shown = Callable[[int, str], bool]
"""A function that the engine calls with the index of a prompt and the text of its completion so far. Returns whether
the completion goes on."""


class Engine(Protocol):
    """A base with its adapters, ready to complete prompts. Its class is called with `EngineSettings`."""

    continuous: bool
    """Whether a completion is independent of the other prompts in the same call. If not, because they share padded
    batches, infer always submits the same prompts together. The same holds for losses."""

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        """Complete the prompts with an adapter (None: the base). Returns the completions in the prompts' order.

        Calls `done` for each completion as soon as it is finished, in any order. After an exception, infer tries each
        unfinished prompt alone.
        """

    def losses(self, answers: list[GivenAnswer], adapter: str | None, done: DoneLoss | None = None) -> list[float]:
        """The loss of each answer with an adapter (None: the base): the sum, in nats, of the cross entropies of the
        tokens that count, each after all tokens before it. Without tokens that count, it is 0.

        Calls `done` for each loss as soon as it is computed, in any order. An exception is handled as that of
        `generate`.
        """

    def find_batch_size(self, prompts: list[Prompt]) -> tuple[int, str]:
        """Find the number of sequences to decode together, and use it from now on. Returns it and the reason.

        `prompts` are the longest prompts of the job, the longest first. infer calls this once per stage, with
        `infer.batch_size: auto`. Later starts get the number in their settings.
        """

    def close(self) -> None:
        """Free the memory and end the engine's processes."""


@runtime_checkable
class StreamingEngine(Protocol):
    """An engine, if it also shows completions while it writes them."""

    def stream(self, prompts: list[Prompt], adapter: str | None, shown: Shown) -> list[Completion]:
        """Complete the prompts together with an adapter (None: the base). Returns the completions in their order.

        Calls `shown` each time that a text grows. A completion that `shown` ends has the finish reason `stop`.
        """


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs to start."""

    model: Path
    """Folder in Hugging Face format."""
    adapters: dict[str, Path]
    """Folders of LoRA adapters, by name."""
    dtype: str
    """torch's name of the weights' type, such as `bfloat16`."""
    max_new_tokens: int
    """Largest number of tokens of a completion whose prompt sets no limit."""
    batch_size: int | None
    """Number of sequences decoded together; None: infer calls `find_batch_size`."""
    max_length: int
    """Largest number of tokens of a prompt with its completion."""
    seed: int
    """Seed of the engine's own random numbers. Prompts with a temperature have their own seeds."""
    tensor_parallel: int = 1
    """Number of GPUs that share the weights."""
    max_pictures: int = 0
    """Largest number of pictures in a prompt."""
    max_pixels: int = 0
    """Number of pixels of the largest picture; 0: the model's own limit."""
    trust_remote_code: bool = False
    """Whether Python files in the model's folder may run."""
    computes_losses: bool = False
    """Whether `losses` is called."""
