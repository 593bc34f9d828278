"""How long the samples are, before a training process exists: what memory the plan has to count with."""

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
"""Samples that are tokenised: the longest and the shortest by their size. Those by tokens are among them, or near."""

CHARACTERS = 2
"""Of a text, that weigh as much as a picture's token in that size: in English it would be four, in Chinese one."""

OF_A_MESSAGE, OF_A_PROMPT, OF_A_PICTURE = 6, 24, 2
"""Tokens that chat templates put around a message and a picture, and a system prompt of their own."""


@dataclass(frozen=True)
class _Sample:
    texts: list[str]
    """Of its messages."""
    asked: int
    """How many of them stand before the first answer."""
    pictures: int
    """Tokens of its pictures, with what stands around them."""

    @property
    def size(self) -> int:
        return sum(map(len, self.texts)) + CHARACTERS * self.pictures

    @property
    def prompt_size(self) -> int:
        return self.size - sum(map(len, self.answers))

    @property
    def answers(self) -> list[str]:
        """The first answer with all that follows it: of a conversation, every answer is learnt."""
        return self.texts[self.asked :]


def lengths_of(samples: list[dict[str, Any]], model: Path, settings: Train, run: Path) -> Lengths:
    """The longest sample and the longest answer that are trained on, in tokens. Pictures are files below `run`.

    What a picture becomes is the model's own affair: it is counted, from the file's header, for the Qwen2-VL family and
    for LLaVAs; with others samples with pictures count as max_length. So does all, answers too, where the model has no
    tokenizer.json. Raises DataError for a picture that is none.
    """
    limit = settings.max_length
    if not samples or not (model / "tokenizer.json").is_file():
        return Lengths(limit, limit)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rules = family_rules(model)

    @cache  # samples share pages
    def of_picture(name: str) -> int:
        return open_picture(run / name, rules, settings.max_pixels).tokens + OF_A_PICTURE if rules else 0

    def tokens(text: str) -> int:
        pieces = text.split("<image>") if rules else [text]
        return sum(len(tokenizer.encode(piece, add_special_tokens=False).ids) for piece in pieces)

    counted = []
    for sample in samples:
        texts = [str(message["content"]) for message in sample["messages"]]
        asked = next(place for place, message in enumerate(sample["messages"]) if message["role"] == "assistant")
        counted.append(_Sample(texts, asked, sum(map(of_picture, sample.get("images") or []))))
    longest = heapq.nlargest(CANDIDATES, counted, key=lambda sample: sample.size)
    prompts = heapq.nsmallest(CANDIDATES, counted, key=lambda sample: sample.prompt_size)
    answers = heapq.nlargest(CANDIDATES, (sample.answers for sample in counted), key=lambda texts: sum(map(len, texts)))
    whole = max(sum(tokens(text) + OF_A_MESSAGE for text in one.texts) + one.pictures for one in longest) + OF_A_PROMPT
    if rules is None and any(sample.get("images") for sample in samples):
        whole = limit
    answer = max(sum(tokens(text) + OF_A_MESSAGE for text in texts) for texts in answers)
    # what the template adds is left out: it errs upward
    shortest = min(sum(map(tokens, one.texts[: one.asked])) + one.pictures for one in prompts)
    return Lengths(min(whole, limit), min(answer, limit), shortest)


def read_lengths(path: Path, model: Path, settings: Train, run: Path) -> Lengths:
    """The same, of a file of samples."""
    return lengths_of(read_jsonl(path), model, settings, run)
