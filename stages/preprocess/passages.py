"""Split a page's text into passages that an embedder reads whole: text beyond its window would never be found."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OVERLAP = 0.25
"""Share of a passage that the next one repeats. A sentence on the border is whole in one of the two, unless it is
longer than this share."""

SPARE = 2
"""Tokens kept free in each passage: without the text before it, its beginning may be split into more tokens."""

Spans = list[tuple[int, int]]
"""First and last character, the latter exclusive, of each token of a text."""


@dataclass(frozen=True)
class Window:
    """What an embedder reads of a text."""

    tokenizer: Any
    """A `tokenizers.Tokenizer` without truncation."""
    tokens: int
    """How many tokens of the text; those that the embedder adds do not count."""

    def is_longer(self, text: str) -> bool:
        """Whether a text has more tokens than the embedder reads."""
        return len(self._spans(text)) > self.tokens

    def passages(self, text: str) -> list[str]:
        """Return passages that the embedder reads whole, in order: the text itself if it is short enough, otherwise
        parts of it, each of which repeats the end of the one before. Always at least one, which may be empty."""
        return split_text(text, self._spans, self.tokens)

    def _spans(self, text: str) -> Spans:
        """The spans of a text's tokens, without special tokens."""
        spans: Spans = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return spans


def sentence_window(folder: Path) -> Window:
    """The window of a sentence-transformers model.

    Its size is `max_seq_length` in sentence_bert_config.json. Without that, it is the smaller of the tokenizer's
    `model_max_length` and the model's `max_position_embeddings`, as in sentence-transformers, or 512 if neither is set.
    The special tokens are subtracted.
    """
    modules = _read_json_file(folder / "modules.json") or [{"path": ""}]
    folder = folder / modules[0]["path"]
    most = (_read_json_file(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    if not most:
        known = [
            (_read_json_file(folder / "tokenizer_config.json") or {}).get("model_max_length"),
            (_read_json_file(folder / "config.json") or {}).get("max_position_embeddings"),
        ]
        most = min((int(value) for value in known if value and value > 0), default=512)
    tokenizer = read_tokenizer(folder)
    return Window(tokenizer, max(int(most) - len(tokenizer.encode("").ids), 1))


def read_tokenizer(folder: Path) -> Any:
    """A model's `tokenizers.Tokenizer` without truncation or padding."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:  # an older model's vocabulary, which transformers converts
        from transformers import AutoTokenizer

        load: Any = AutoTokenizer.from_pretrained
        tokenizer = load(folder, local_files_only=True).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json_file(path: Path) -> Any:
    """The content of a JSON file; None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def split_text(text: str, spans_of: Callable[[str], Spans], most: int) -> list[str]:
    """Split a text into overlapping passages of at most `most` tokens. A text that is short enough is the only passage,
    unchanged. `spans_of` returns the spans of a text's tokens."""
    spans = spans_of(text)
    if len(spans) <= most:
        return [text]
    begins = _word_starts(text, spans)
    most = max(most - SPARE, 1)
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


def _word_starts(text: str, spans: Spans) -> set[int]:
    """The places of the tokens that begin a word: the first, those after white space, and those that begin with a
    Chinese or Japanese character."""
    return {
        place
        for place, (start, _) in enumerate(spans)
        if start == 0 or text[start - 1].isspace() or re.match(r"[\u3000-\u9fff\uff00-\uffef]", text[start])
    }
