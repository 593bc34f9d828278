"""Lengths of the samples in tokens, counted before training starts: the memory plan needs them."""

import heapq
import json
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stages.contract.files import read_jsonl
from stages.contract.recipe import Train
from stages.hardware.memory import Lengths
from stages.models.pictures import family_rules, open_picture

CANDIDATES = 64
"""How many of the longest samples and of the longest answers are tokenised. They are chosen by estimated length; the
extremes in tokens are among them, or close."""

DRAWN = 200
"""How many samples, evenly spaced, are tokenised for the mean length. Its standard error is then a fourteenth of the
lengths' standard deviation."""

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
    def answers(self) -> list[str]:
        """Texts of the first answer and of every message after it: the adapter learns all answers of a conversation."""
        return self.texts[self.prompt_messages :]


def measure_lengths(samples: list[dict[str, Any]], model: Path, settings: Train, run: Path) -> Lengths:
    """Measure the longest and the shortest sample, the longest answer, and the mean length of a sample with its
    standard deviation, in tokens. All are at most max_length. Picture names are relative to the folder `run`.

    Tokenises only CANDIDATES samples for each of the first three, chosen by estimated length, and DRAWN for the last.
    Lengths, but for the shortest, include the most tokens that a chat template can add. For the Qwen2-VL family, LLaVAs
    and MGM, only the header of a picture's file is read to count its tokens. For other models, a sample with pictures
    counts as max_length. If the model has no tokenizer.json, or there are no samples, all samples and answers count as
    max_length. Raises DataError for a file that is not a picture, or whose sides have a ratio that the model does not
    accept.
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
        texts = [_text_of(message) for message in sample["messages"]]
        before = next((place for place, one in enumerate(sample["messages"]) if one["role"] == "assistant"), 0)
        if sample.get("tools"):
            texts.insert(0, json.dumps(sample["tools"], ensure_ascii=False, indent=4))
            before += 1
        texts += [sample["text"]] if sample.get("text") is not None else []
        counted.append(_Sample(texts, before, sum(map(count_picture_tokens, sample.get("images") or []))))
    longest = heapq.nlargest(CANDIDATES, counted, key=lambda sample: sample.size)
    answers = heapq.nlargest(CANDIDATES, (sample.answers for sample in counted), key=lambda texts: sum(map(len, texts)))
    answer = max(sum(count_tokens(text) + OF_A_MESSAGE for text in texts) for texts in answers)
    if rules is None and any(sample.get("images") for sample in samples):
        return Lengths(limit, min(answer, limit))

    def count_sample(sample: _Sample) -> int:
        """Count a sample's tokens, at most `limit`."""
        texts = sum(count_tokens(text) + OF_A_MESSAGE for text in sample.texts)
        return min(texts + sample.pictures + OF_A_PROMPT, limit)

    drawn = [count_sample(sample) for sample in counted[:: -(-len(counted) // DRAWN)]]
    whole = max(map(count_sample, longest))
    few = heapq.nsmallest(CANDIDATES, counted, key=lambda sample: sample.size)
    shortest = min(sum(map(count_tokens, sample.texts)) + sample.pictures for sample in few)
    mean, deviation = statistics.fmean(drawn), statistics.pstdev(drawn)
    return Lengths(whole, min(answer, limit), mean, deviation, max(min(shortest, limit), 1))


def _text_of(message: dict[str, Any]) -> str:
    """All that a template writes of a message, and about as long as there."""
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    return str(message.get("content") or "") + (json.dumps(others, ensure_ascii=False) if others else "")


def read_lengths(path: Path, model: Path, settings: Train, run: Path) -> Lengths:
    """Measure the samples in the JSON Lines file `path` as `measure_lengths` does, with the same errors."""
    return measure_lengths(read_jsonl(path), model, settings, run)
