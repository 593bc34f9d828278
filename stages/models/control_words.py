"""Control words: the words that a tokenizer turns into one token, such as `<|im_end|>`, `</s>` or `<think>`.

A chat template writes them to mark turns. Where data say the same words, they are text: this module encodes them as the
tokenizer encodes any other text, and they keep their meaning where the template writes them.

While a template or another library handles a text, each control word that data say is hidden: a stand-in of two
characters takes its place. `encode` puts the words back and encodes them as text. The tokens of a text without
stand-ins are the tokenizer's own.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Any

from stages.contract.errors import UsageError

STAND_IN = "\U0010fffd"
"""Begins each stand-in: a character for private use, which no text has. If one does, a stand-in takes its place too."""
FIRST = 0x100000
"""Second character of the first word's stand-in. It and those after it are for private use, too."""

_STOOD_IN = re.compile(f"{STAND_IN}(.)", re.DOTALL)
_MARKUP = re.compile(r"\s*[<\[{|].*[>\]}|]\s*", re.DOTALL)
"""Form of a control word that the tokenizer does not call special, such as `<think>`. Others are words of a language
or white space that were added to the vocabulary."""


class ControlWords:
    """The control words of one tokenizer."""

    def __init__(self, tokenizer: Any, others: Collection[str] = ()) -> None:
        """`others` are words that are hidden too, because they have a meaning for what handles the texts."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._tokens: dict[str, int] = {
            token.content: number
            for number, token in added.items()
            if token.content.strip() and (token.special or _MARKUP.fullmatch(token.content))
        }
        self._plain = {token.content for token in added.values() if not token.special}
        self._words = [STAND_IN, *self._tokens, *(word for word in others if word not in self._tokens)]
        self._stand_ins = {word: STAND_IN + chr(FIRST + place) for place, word in enumerate(self._words)}
        self._said, self._written = _any_of(self._words), _any_of(self._tokens)
        self._twins: dict[str, _Twin] = {}

    @cached_property
    def in_answers(self) -> frozenset[str]:
        """The control words that keep their meaning in an assistant's turn: those that the chat template names and that
        the tokenizer does not call special, such as `<think>` and `<tool_call>`. They are a part of what the model
        answers, and templates look for them there."""
        template = self._tokenizer.chat_template
        named = template if isinstance(template, str) else "".join((template or {}).values())
        return frozenset(word for word in self._plain & self._tokens.keys() if word in named)

    def hide(self, text: str, kept: Collection[str] = ()) -> str:
        """The text with a stand-in for each word that it says, but for those in `kept`."""
        return self._said.sub(lambda found: found[0] if found[0] in kept else self._stand_ins[found[0]], text)

    def show(self, text: str) -> str:
        """The text with the words in place of their stand-ins."""
        return _STOOD_IN.sub(lambda found: self._words[ord(found[1]) - FIRST], text)

    def hidden_in(self, texts: Iterable[str]) -> Counter[str]:
        """The control words that are hidden in texts, with how often each is."""
        places = (character for text in texts for character in _STOOD_IN.findall(text))
        words = (self._words[ord(character) - FIRST] for character in places)
        return Counter(word for word in words if word in self._tokens)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without those that the tokenizer adds around it. What is hidden is encoded as text.

        Raises UsageError if something is hidden and the tokenizer is not one of the tokenizers library.
        """
        if STAND_IN not in text:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        shown = self.show(text)
        mark = next(mark for mark in map(chr, range(FIRST - 3, 0, -1)) if mark not in shown)
        if mark not in self._twins:
            self._twins[mark] = _Twin(self._tokenizer, self._tokens, mark)
        twin = self._twins[mark]
        return twin.encode(self.show(self._written.sub(lambda found: twin.spelling[found[0]], text)))


SAMPLES = "samples"
"""Key of `count_said` for the number of samples."""


def count_said(each: Iterable[Counter[str]]) -> dict[str, int]:
    """How often control words are said in samples, by word, and in how many of the samples any is, for the manifest;
    empty if none is. `each` has the words of each sample."""
    said: Counter[str] = Counter()
    for words in filter(None, each):
        said += words + Counter({SAMPLES: 1})
    return dict(said)


def said_note(said: Mapping[str, int]) -> str:
    """What `count_said` counted, for the console."""
    word = next(word for word in said if word != SAMPLES)
    return f"{said[SAMPLES]} samples say control words of the model, such as {word!r}; they are encoded as text"


class _Twin:
    """A copy of a tokenizer that knows its control words by another spelling only."""

    def __init__(self, tokenizer: Any, tokens: Collection[str], mark: str) -> None:
        """`mark` is a character that is in no text to encode; each other spelling begins with it."""
        if not tokenizer.is_fast:
            raise UsageError(
                f"{tokenizer.name_or_path}: the data contain control words of this tokenizer, which cannot encode them"
                " as text without a tokenizer.json; save it as a fast tokenizer"
            )
        from tokenizers import Tokenizer

        self.spelling = {word: mark + chr(FIRST + place) for place, word in enumerate(tokens)}
        values = json.loads(tokenizer.backend_tokenizer.to_str())
        numbers = {token["content"]: token["id"] for token in values["added_tokens"]}
        for token in values["added_tokens"]:
            token["content"] = self.spelling.get(token["content"], token["content"])
        _rename(values["model"], self.spelling)
        self._twin = Tokenizer.from_str(json.dumps(values))
        self._twin.no_truncation()
        self._twin.no_padding()
        # a word that is in no vocabulary gets another number
        self._numbers = {self._twin.token_to_id(self.spelling.get(word, word)): own for word, own in numbers.items()}

    def encode(self, text: str) -> list[int]:
        """The tokens of a text in which control words have this tokenizer's spelling, as the other numbers them."""
        return [self._numbers.get(token, token) for token in self._twin.encode(text, add_special_tokens=False).ids]


def _rename(model: dict[str, Any], spelling: dict[str, str]) -> None:
    """Rename control words in a tokenizer model's vocabulary: some models find a whole word there by itself."""
    merged = {
        part for merge in model.get("merges", []) for part in (merge if isinstance(merge, list) else merge.split(" "))
    }
    made = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model.get("merges", [])}
    names = {word: other for word, other in spelling.items() if word not in merged | made}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): number for word, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _any_of(words: Collection[str]) -> re.Pattern[str]:
    """A pattern for the longest of the words at a place."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
