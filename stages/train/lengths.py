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
"""How many of the longest samples, of the longest answers and of the shortest prompts are tokenised. They are chosen by
estimated length; the extremes in tokens are among them, or close."""

CHARACTERS = 2
"""Characters that count as one token in an estimated length: four would fit English, one Chinese."""

OF_A_MESSAGE, OF_A_PROMPT, OF_A_PICTURE = 6, 24, 2
"""Tokens that a chat template adds at most: around a message, for its own system prompt, and around a picture."""


@dataclass(frozen=True)
class _Sample:
    """What a sample's length depends on."""

    texts: list[str]
    """Text of each message."""
    prompt_messages: int
    """Number of messages before the first answer."""
    pictures: int
    """Number of tokens of its pictures, with those that the template adds around them."""

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
        """Texts of the first answer and of every message after it: the adapter learns all answers of a conversation."""
        return self.texts[self.prompt_messages :]


def measure_lengths(samples: list[dict[str, Any]], model: Path, settings: Train, run: Path) -> Lengths:
    """Measure the longest sample, the longest answer and the shortest prompt, in tokens. The first two are at most
    max_length. Picture names are relative to the folder `run`.

    Tokenises only CANDIDATES samples for each of the three, chosen by estimated length. The first two lengths include
    the most tokens that a chat template can add, the third only those around pictures. For the Qwen2-VL family, LLaVAs
    and MGM, only the header of a picture's file is read to count its tokens. For other models, a sample with pictures
    counts as max_length. If the model has no tokenizer.json, or there are no samples, sample and answer count as
    max_length and the shortest prompt is None. Raises DataError for a file that is not a picture, or whose sides have a
    ratio that the model does not accept.
    """
    limit = settings.max_length
    if not samples or not (model / "tokenizer.json").is_file():
        return Lengths(limit, limit)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # control words in samples are text: `</s>` takes more than one token
    rules = family_rules(model)

    @cache  # samples share pages
    def count_picture_tokens(name: str) -> int:
        """Count a picture's tokens and those around it; 0 if Lorry does not know the model's rules for pictures."""
        return open_picture(run / name, rules, settings.max_pixels).tokens + OF_A_PICTURE if rules else 0

    def count_tokens(text: str) -> int:
        """Count the tokens of a text. Its `<image>` tags count as text only if `count_picture_tokens` returns 0."""
        pieces = text.split("<image>") if rules else [text]
        return sum(len(tokenizer.encode(piece, add_special_tokens=False).ids) for piece in pieces)

    counted = []
    for sample in samples:
        texts = [str(message["content"]) for message in sample["messages"]]
        before = next(place for place, message in enumerate(sample["messages"]) if message["role"] == "assistant")
        counted.append(_Sample(texts, before, sum(map(count_picture_tokens, sample.get("images") or []))))
    longest = heapq.nlargest(CANDIDATES, counted, key=lambda sample: sample.size)
    prompts = heapq.nsmallest(CANDIDATES, counted, key=lambda sample: sample.prompt_size)
    answers = heapq.nlargest(CANDIDATES, (sample.answers for sample in counted), key=lambda texts: sum(map(len, texts)))
    whole = (
        max(sum(count_tokens(text) + OF_A_MESSAGE for text in one.texts) + one.pictures for one in longest)
        + OF_A_PROMPT
    )
    if rules is None and any(sample.get("images") for sample in samples):
        whole = limit
    answer = max(sum(count_tokens(text) + OF_A_MESSAGE for text in texts) for texts in answers)
    # without the template's tokens around messages, whose number is an upper bound: this must be a lower bound
    shortest = min(sum(map(count_tokens, one.texts[: one.prompt_messages])) + one.pictures for one in prompts)
    return Lengths(min(whole, limit), min(answer, limit), shortest)


def read_lengths(path: Path, model: Path, settings: Train, run: Path) -> Lengths:
    """Measure the samples in the JSON Lines file `path` as `measure_lengths` does, with the same errors."""
    return measure_lengths(read_jsonl(path), model, settings, run)
