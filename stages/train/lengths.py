"""Lengths of the samples in tokens, counted before training starts: the memory plan needs them."""

import heapq
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stages.contract.files import read_jsonl
from stages.contract.recipe import Train
from stages.hardware.memory import Lengths
from stages.models.pictures import family_rules, open_picture

CANDIDATES = 64
"""Samples that are tokenised: the longest and the shortest by size. The longest and shortest by tokens are among them,
or close."""

CHARACTERS = 2
"""Characters that count as one token in a sample's size: four would fit English, one Chinese."""

OF_A_MESSAGE, OF_A_PROMPT, OF_A_PICTURE = 6, 24, 2
"""Tokens that a chat template adds: around a message, for its own system prompt, and around a picture."""


@dataclass(frozen=True)
class _Sample:
    texts: list[str]
    """Text of each message."""
    asked: int
    """Messages before the first answer."""
    pictures: int
    """Tokens of its pictures, with those around them."""

    @property
    def size(self) -> int:
        """Estimated length of the whole sample, in characters."""
        return sum(map(len, self.texts)) + CHARACTERS * self.pictures

    @property
    def prompt_size(self) -> int:
        """Estimated length of the prompt, in characters."""
        return self.size - sum(map(len, self.answers))

    @property
    def answers(self) -> list[str]:
        """The first answer and everything after it: the adapter learns every answer of a conversation."""
        return self.texts[self.asked :]


def lengths_of(samples: list[dict[str, Any]], model: Path, settings: Train, run: Path) -> Lengths:
    """Tokens of the longest sample, the longest answer and the shortest prompt, at most max_length each. Picture names
    are relative to `run`.

    A picture's tokens depend on the model. For the Qwen2-VL family and LLaVAs they are counted from the file's header;
    for other models, a sample with pictures counts as max_length. If the model has no tokenizer.json, every sample and
    answer counts as max_length. Raises DataError for a file that is no picture.
    """
    limit = settings.max_length
    if not samples or not (model / "tokenizer.json").is_file():
        return Lengths(limit, limit)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rules = family_rules(model)

    @cache  # samples share pages
    def picture_tokens(name: str) -> int:
        return open_picture(run / name, rules, settings.max_pixels).tokens + OF_A_PICTURE if rules else 0

    def tokens(text: str) -> int:
        pieces = text.split("<image>") if rules else [text]
        return sum(len(tokenizer.encode(piece, add_special_tokens=False).ids) for piece in pieces)

    counted = []
    for sample in samples:
        texts = [str(message["content"]) for message in sample["messages"]]
        asked = next(place for place, message in enumerate(sample["messages"]) if message["role"] == "assistant")
        counted.append(_Sample(texts, asked, sum(map(picture_tokens, sample.get("images") or []))))
    longest = heapq.nlargest(CANDIDATES, counted, key=lambda sample: sample.size)
    prompts = heapq.nsmallest(CANDIDATES, counted, key=lambda sample: sample.prompt_size)
    answers = heapq.nlargest(CANDIDATES, (sample.answers for sample in counted), key=lambda texts: sum(map(len, texts)))
    whole = max(sum(tokens(text) + OF_A_MESSAGE for text in one.texts) + one.pictures for one in longest) + OF_A_PROMPT
    if rules is None and any(sample.get("images") for sample in samples):
        whole = limit
    answer = max(sum(tokens(text) + OF_A_MESSAGE for text in texts) for texts in answers)
    # without the template's tokens: those are an upper estimate, and this is a lower one
    shortest = min(sum(map(tokens, one.texts[: one.asked])) + one.pictures for one in prompts)
    return Lengths(min(whole, limit), min(answer, limit), shortest)


def read_lengths(path: Path, model: Path, settings: Train, run: Path) -> Lengths:
    """`lengths_of` for a file of samples."""
    return lengths_of(read_jsonl(path), model, settings, run)
