"""What an engine is: base and adapters loaded once, prompts in as tokens and pictures, completions out."""

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
    """`stop`, or `length` when the limit cut it off."""


Done = Callable[[int, Completion], None]
"""Called with the place of a prompt among those submitted and its completion, as soon as that is there."""


class Engine(Protocol):
    continuous: bool
    """Whether prompts flow through the engine one by one. If not, they are computed in batches, and which prompts are
    submitted together decides who shares a batch."""

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        """Completions, in the order of the prompts; `adapter` None asks the base model."""

    def find_batch_size(self, prompts: list[Prompt]) -> tuple[int, str]:
        """Set `batch_size` to what suits these prompts, the longest of all; returns it and why it is that."""

    def close(self) -> None:
        """Give the memory back."""


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs to start."""

    model: Path
    adapters: dict[str, Path]
    dtype: str
    max_new_tokens: int
    batch_size: int | None
    """Sequences decoded together; None: the engine finds out."""
    max_length: int
    """Tokens of the longest prompt with its completion."""
    seed: int
    tensor_parallel: int = 1
    """GPUs that share the weights."""
    max_pictures: int = 0
    """Pictures of the prompt with the most."""
    max_pixels: int = 0
    """Of the largest picture."""
