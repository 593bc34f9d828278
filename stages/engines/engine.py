"""The interface of engines. An engine loads base and adapters once and completes prompts of tokens and pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stages.models.rendering import Prompt


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


class Engine(Protocol):
    """A base with its adapters, ready to complete prompts. Its class is called with `EngineSettings`."""

    continuous: bool
    """Whether a completion is independent of the other prompts in the same call. If not, because they share padded
    batches, infer always submits the same prompts together."""

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        """Complete the prompts with an adapter (None: the base). Returns the completions in the prompts' order.

        Calls `done` for each completion as soon as it is finished, in any order. After an exception, infer tries each
        unfinished prompt alone.
        """

    def find_batch_size(self, prompts: list[Prompt]) -> tuple[int, str]:
        """Find the number of sequences to decode together, and use it from now on. Returns it and the reason.

        `prompts` are the longest prompts of the job, the longest first. infer calls this once per stage, with
        `infer.batch_size: auto`. Later starts get the number in their settings.
        """

    def close(self) -> None:
        """Free the memory and end the engine's processes."""


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
    """Number of pixels of the largest picture."""
    trust_remote_code: bool = False
    """Whether Python files in the model's folder may run."""
