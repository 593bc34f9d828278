"""A page's text in passages that an embedder reads whole: what is beyond its window is never seen."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

OVERLAP = 0.25
"""Share of a passage that the next one repeats: a sentence on the border is whole in one of them, if no longer."""


@dataclass(frozen=True)
class Window:
    """What a sentence-transformers model reads of a text."""

    folder: Path

    @cached_property
    def tokens(self) -> int:
        """Tokens of its own that it reads of a text, those that its tokenizer adds left out."""
        return max(self._most - len(self._tokenizer.encode("", add_special_tokens=True).ids), 8)

    def passages(self, text: str) -> list[str]:
        """The text as it is where the model reads it whole; else pieces that it reads whole, in order, each of which
        repeats the end of the one before it. At least one, which may be empty."""
        return split_text(text, self._spans, self.tokens)

    @cached_property
    def _most(self) -> int:
        """Source: sentence_bert_config.json; a model without one reads as far as its positions go."""
        for name, key in (("sentence_bert_config.json", "max_seq_length"), ("config.json", "max_position_embeddings")):
            path = self.folder / name
            if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8")).get(key)):
                return int(found)
        return 256

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _spans(self, text: str) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return spans


def split_text(text: str, spans_of: Callable[[str], list[tuple[int, int]]], most: int) -> list[str]:
    """Passages of at most `most` tokens. `spans_of` gives the tokens of a text: first and last character of each."""
    spans = spans_of(text)
    if len(spans) <= most:
        return [text]
    begins = _word_starts(text, spans)
    found, first = [], 0
    while first < len(spans):
        last = min(first + most, len(spans))
        if last < len(spans):  # end before a word, not in it
            last = next((place for place in range(last, first + most // 2, -1) if place in begins), last)
        end = spans[last][0] if last < len(spans) else len(text)
        found.append(text[spans[first][0] : end].strip())
        if last >= len(spans):
            break
        back = max(last - int(most * OVERLAP), first + 1)
        first = next((place for place in range(back, last) if place in begins), last)
    return found


def _word_starts(text: str, spans: list[tuple[int, int]]) -> set[int]:
    """Tokens that begin a word: those after white space, and every one beside a Chinese or Japanese character."""
    return {
        place
        for place, (start, _) in enumerate(spans)
        if start == 0 or text[start - 1].isspace() or re.match(r"[\u3000-\u9fff\uff00-\uffef]", text[start])
    }
