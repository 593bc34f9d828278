"""What an engine is: base and adapters loaded once, prompts in as tokens, completions out.

Both engines get the same tokens, rendered here by the model's own chat template, so that their greedy answers differ
only by the arithmetic of their kernels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages.contract.records import Sample


@dataclass(frozen=True)
class Prompt:
    """A sample's prompt as the model reads it."""

    id: str
    tokens: list[int]


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt."""

    text: str
    tokens: int
    finish_reason: str
    """`stop`, or `length` when the limit cut it off."""


class Engine(Protocol):
    def generate(self, prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        """Greedy completions, in the order of the prompts; `adapter` None asks the base model."""

    def close(self) -> None:
        """Give the memory back."""


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs to start."""

    model: Path
    adapters: dict[str, Path]
    dtype: str
    max_new_tokens: int
    batch_size: int
    max_length: int
    """Tokens of the longest prompt with its completion."""
    seed: int


def load_tokenizer(model: Path) -> Any:
    """The model's own tokenizer, from its folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True)


def render(tokenizer: Any, sample: Sample) -> Prompt:
    """Tokens of a sample's conversation, with the beginning of the answer that the chat template asks for."""
    tokens = tokenizer.apply_chat_template(
        sample["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return Prompt(sample["id"], list(tokens))
