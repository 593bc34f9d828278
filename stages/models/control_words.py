"""Control words: the words that a tokenizer turns into one token, such as `<|im_end|>`, `</s>` or `<think>`.

A chat template writes them to mark turns, and there they keep their meaning. If the same words occur in the data, they
are plain text: this module encodes them as the tokenizer encodes any other text.

While a template or another library handles a text, each control word from the data is hidden: a stand-in of two
characters replaces it. `encode` puts the words back and encodes them as text. A text without stand-ins gets the
tokenizer's own tokens.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from stages.contract.errors import UsageError

STAND_IN = "\U00010600"
"""First character of each stand-in, of a script that nobody writes (Linear A). In a text, a stand-in replaces it too.
Python's `repr`, in which some templates write tools, leaves it as it is, unlike a private-use character."""
SECOND = 0x20000
"""Second character of the first word's stand-in. It and the following 42,000, for the other words, are Chinese
characters, which `repr` leaves too."""
FIRST = 0x100000
"""Second character of a twin's first control word. It and the following ones are private-use."""

LOOKED_AT = 256
"""Number of characters at the end of a text in which `ControlWords.starts` searches."""

_STOOD_IN = re.compile(f"{STAND_IN}(.)", re.DOTALL)
_MARKUP = re.compile(r"\s*[<\[{|].*[>\]}|]\s*", re.DOTALL)
"""Form of a control word that the tokenizer does not mark as special, such as `<think>`. Tokens of another form are
words of a language or white space that were added to the vocabulary."""


class ControlWords:
    """The control words of one tokenizer."""

    def __init__(self, tokenizer: Any, others: Collection[str] = (), template: str | None = None) -> None:
        """Find the control words of a tokenizer and choose their stand-ins.

        `others` are more words to hide, because they have a meaning for the library that handles the texts. `template`
        is the chat template that is used; None: the tokenizer's own.
        """
        self._tokenizer, self._template = tokenizer, template
        added = tokenizer.added_tokens_decoder
        self._tokens: dict[str, int] = {
            token.content: number
            for number, token in added.items()
            if token.content.strip() and (token.special or _MARKUP.fullmatch(token.content))
        }
        self._plain = {token.content for token in added.values() if not token.special}
        self._words = [STAND_IN, *self._tokens, *(word for word in others if word not in self._tokens)]
        self._stand_ins = {word: STAND_IN + chr(SECOND + place) for place, word in enumerate(self._words)}
        self._said, self._written = _pattern_of_any(self._words), _pattern_of_any(self._tokens)
        self._twins: dict[str, _Twin] = {}

    @cached_property
    def in_answers(self) -> frozenset[str]:
        """The control words that keep their meaning in an assistant's turn, such as `<think>` and `<tool_call>`.

        The chat template names them, and the tokenizer does not mark them as special. They are part of the model's
        answers, and templates look for them there.
        """
        template = self._template or self._tokenizer.chat_template
        named = template if isinstance(template, str) else "".join((template or {}).values())
        return frozenset(word for word in self._plain & self._tokens.keys() if word in named)

    def starts(self, text: str) -> int:
        """The place of the last control word in a text that is one token; 0 if its last LOOKED_AT characters have
        none."""
        return max((found.start() for found in self._written.finditer(text, max(len(text) - LOOKED_AT, 0))), default=0)

    def hide(self, text: str, kept: Collection[str] = ()) -> str:
        """The text with a stand-in for each control word and each of `others`, except for those in `kept`."""
        return self._said.sub(lambda found: found[0] if found[0] in kept else self._stand_ins[found[0]], text)

    def hide_all(self, value: Any) -> Any:
        """A JSON value with every text in it hidden, keys included."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide_all(inner) for key, inner in value.items()}
        return [self.hide_all(inner) for inner in value] if isinstance(value, list | tuple) else value

    def show(self, text: str) -> str:
        """The text with each stand-in replaced by its word."""
        return _STOOD_IN.sub(lambda found: self._words[ord(found[1]) - SECOND], text)

    def hidden_in(self, texts: Iterable[str]) -> Counter[str]:
        """How often these texts contain a stand-in for each control word."""
        places = (character for text in texts for character in _STOOD_IN.findall(text))
        words = (self._words[ord(character) - SECOND] for character in places)
        return Counter(word for word in words if word in self._tokens)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without those that the tokenizer adds around it. Hidden words are encoded as text.

        Raises UsageError if the text has hidden words and the tokenizer is not a fast one (tokenizers library).
        """
        if STAND_IN not in text:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        shown = self.show(text)
        mark = next(mark for mark in map(chr, range(FIRST - 3, 0, -1)) if mark not in shown)
        if mark not in self._twins:
            self._twins[mark] = _Twin(self._tokenizer, self._tokens, mark)
        twin = self._twins[mark]
        return twin.encode(self.show(self._written.sub(lambda found: twin.spelling[found[0]], text)))

    def encode_parts(self, text: str, known: dict[str, list[int]]) -> list[int]:
        """What `encode` returns, by the parts of the text that begin with a control word.

        `known` has the tokens of parts, to which this adds those that it lacks: the prompts of a conversation share
        most of theirs.
        """
        if not self._splits_texts:
            return self.encode(text)
        bounds = [0, *(found.start() for found in self._written.finditer(text)), len(text)]
        tokens: list[int] = []
        for begin, end in pairwise(bounds):
            part = text[begin:end]
            if part not in known:
                known[part] = self.encode(part)
            tokens += known[part]
        return tokens

    @cached_property
    def _splits_texts(self) -> bool:
        """Whether the tokens of a part do not depend on what is before it: no added token takes up white space before
        it, needs a word's end there, or is looked for in a text that is normalised as a whole."""
        added = self._tokenizer.added_tokens_decoder.values()
        return not any(token.lstrip or token.single_word or token.normalized for token in added)


SAMPLES = "samples"
"""Key of `count_said` for the number of samples."""


def count_said(each: Iterable[Counter[str]]) -> dict[str, int]:
    """How often each control word occurs in samples and, as SAMPLES, in how many samples any of them occurs.

    For the manifest; empty if none occurs. `each` has the counts of each sample.
    """
    said: Counter[str] = Counter()
    for words in filter(None, each):
        said += words + Counter({SAMPLES: 1})
    return dict(said)


def said_note(said: Mapping[str, int]) -> str:
    """A line for the console about `said`, the counts that `count_said` returned. There must be at least one."""
    word = next(word for word in said if word != SAMPLES)
    return f"{said[SAMPLES]} samples say control words of the model, such as {word!r}; they are encoded as text"


class _Twin:
    """A copy of a tokenizer that recognises its control words only in another spelling."""

    def __init__(self, tokenizer: Any, tokens: Collection[str], mark: str) -> None:
        """Copy a tokenizer and give its control words, `tokens`, a new spelling. Each begins with `mark`, which must
        not occur in a text to encode.

        Raises UsageError if the tokenizer is not a fast one.
        """
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
        _rename_control_words(values["model"], self.spelling)
        self._twin = Tokenizer.from_str(json.dumps(values))
        self._twin.no_truncation()
        self._twin.no_padding()
        # a token that is missing from the vocabulary gets a new number in the copy
        self._numbers = {self._twin.token_to_id(self.spelling.get(word, word)): own for word, own in numbers.items()}

    def encode(self, text: str) -> list[int]:
        """The original tokenizer's token ids of a text. Control words in the new spelling become single tokens."""
        return [self._numbers.get(token, token) for token in self._twin.encode(text, add_special_tokens=False).ids]


def _rename_control_words(model: dict[str, Any], spelling: dict[str, str]) -> None:
    """Rename the control words in the vocabulary of a tokenizer's model, in place.

    Some kinds of tokenizer models would otherwise still find them as whole words. Words that a merge makes or uses keep
    their names.
    """
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


def _pattern_of_any(words: Collection[str]) -> re.Pattern[str]:
    """A pattern that matches any of the words, the longest if several fit. Without words, it matches nothing."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
