"""How long the samples are, before a training process exists: what memory the plan has to count with."""

import heapq
from pathlib import Path
from typing import Any

from stages.contract.files import read_jsonl
from stages.contract.recipe import Train
from stages.hardware.memory import Lengths

CANDIDATES = 64
"""Samples that are tokenised: the longest and the shortest by characters. Those by tokens are among them, or near."""

OF_A_MESSAGE, OF_A_PROMPT = 6, 24
"""Tokens that chat templates put around a message, and a system prompt of their own."""


def lengths_of(samples: list[dict[str, Any]], model: Path, settings: Train) -> Lengths:
    """The longest sample and the longest answer that are trained on, in tokens.

    Samples with pictures count as max_length: what a picture becomes is the model's own affair. So does all, answers
    too, where the model has no tokenizer.json.
    """
    limit = settings.max_length
    if not samples or not (model / "tokenizer.json").is_file():
        return Lengths(limit, limit)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    contents = [[str(message["content"]) for message in sample["messages"]] for sample in samples]

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    longest = heapq.nlargest(CANDIDATES, contents, key=lambda texts: sum(map(len, texts)))
    prompts = heapq.nsmallest(CANDIDATES, (texts[:-1] for texts in contents), key=lambda texts: sum(map(len, texts)))
    answers = heapq.nlargest(CANDIDATES, (texts[-1] for texts in contents), key=len)
    pictures = any(sample.get("images") for sample in samples)
    whole = (
        limit
        if pictures
        else max(sum(tokens(text) + OF_A_MESSAGE for text in texts) for texts in longest) + OF_A_PROMPT
    )
    answer = max(map(tokens, answers)) + OF_A_MESSAGE
    shortest = min(sum(map(tokens, texts)) for texts in prompts)  # what the template adds is left out: it errs upward
    return Lengths(min(whole, limit), min(answer, limit), shortest)


def read_lengths(path: Path, model: Path, settings: Train) -> Lengths:
    """The same, of a file of samples."""
    return lengths_of(read_jsonl(path), model, settings)
