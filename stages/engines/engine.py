"""The interface of engines: base and adapters are loaded once, prompts of tokens and pictures become completions."""

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
    finish_reason: str
    """`stop`, or `length` if the token limit cut it off."""


Done = Callable[[int, Completion], None]
"""Called with a prompt's place among those submitted and its completion, as soon as the completion is there."""


class Engine(Protocol):
    """A base model with its adapters, ready to answer. Made from `EngineSettings`."""

    continuous: bool
    """Whether prompts flow through the engine one by one. If not, prompts that are submitted together share batches,
    and infer always submits the same prompts together."""

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        """Completions, in the order of the prompts. `adapter` None asks the base model.

        Calls `done` for each completion, in any order. An exception fails the prompts that are not done: infer tries
        each of them alone.
        """

    def find_batch_size(self, prompts: list[Prompt]) -> tuple[int, str]:
        """Find the number of sequences to decode together and use it from now on; returns it with the reason.

        `prompts` are the longest ones, longest first. Called for `infer.batch_size: auto`, once for all starts of the
        same work: a later start gets the number in its settings.
        """

    def close(self) -> None:
        """Free the memory."""


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
    """Limit of a completion whose prompt has none of its own."""
    batch_size: int | None
    """Sequences decoded together; None: `find_batch_size` follows."""
    max_length: int
    """Tokens of the longest prompt with its completion."""
    seed: int
    """Seed of the engine's own random numbers; prompts that sample have seeds of their own."""
    tensor_parallel: int = 1
    """GPUs that share the weights."""
    max_pictures: int = 0
    """The number of pictures in the prompt with the most."""
    max_pixels: int = 0
    """Pixels of the largest picture."""
