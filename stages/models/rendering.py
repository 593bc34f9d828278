"""Renders conversations as prompts, with the model's own chat template and rules for pictures.

The content of messages is text. Only the template writes control words such as `<|im_end|>`.

All engines get the same tokens and pictures of the same size. Greedy completions of two engines then differ only by the
arithmetic of their kernels.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError
from stages.contract.records import PLACE, Message, unescape_places
from stages.models.control_words import ControlWords
from stages.models.pictures import Picture, Rules, SquareRules, family_rules, open_picture, rules_of


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    id: str
    tokens: list[int]
    """Token ids, with one placeholder token for each picture."""
    pictures: tuple[Picture, ...] = ()
    max_new_tokens: int | None = None
    """Largest number of tokens of the completion; None: the engine's `EngineSettings.max_new_tokens`."""
    temperature: float = 0.0
    """Temperature of sampling; 0: greedy."""
    seed: int = 0
    """Seed of sampling. The random numbers depend on it alone, not on the other prompts of a batch."""

    @property
    def length(self) -> int:
        """Number of tokens of the prompt, including those of its pictures."""
        return len(self.tokens) + sum(picture.tokens - 1 for picture in self.pictures)

    def repeat_placeholders(self, counts: Sequence[int], placeholder: int) -> list[int]:
        """The prompt's token ids, with the n-th occurrence of `placeholder` repeated `counts[n]` times."""
        left = iter(counts)
        return [same for token in self.tokens for same in [token] * (next(left) if token == placeholder else 1)]


class Renderer:
    """Turns conversations into prompts, with the chat template and the picture rules of one model."""

    def __init__(self, model: Path) -> None:
        """Load the tokenizer from a model folder. The rules for pictures are read when a prompt needs them."""
        self.tokenizer = load_tokenizer(model)
        self._words = ControlWords(self.tokenizer, [PLACE])
        self._model = model
        self._rules: Rules | None = None
        self._placeholder: int | None = None

    @property
    def rules(self) -> Rules:
        """How the model reads pictures. Raises UsageError if it reads none, or Lorry does not support its family."""
        if self._rules is None:
            self._rules = rules_of(self._model)
        return self._rules

    def render(
        self,
        prompt_id: str,
        messages: Sequence[Message],
        pictures: Sequence[Path] = (),
        max_pixels: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Prompt:
        """The prompt of a conversation, including the tokens with which the chat template begins the answer.

        The messages contain `<image>` once for each of `pictures`, in order. Each picture is scaled to at most
        `max_pixels`; None: the model's own limit. Raises DataError for a picture that cannot be read, and if the
        numbers of `<image>` and pictures differ. Raises UsageError if there are pictures, but the model reads none.
        """
        opened = tuple(open_picture(path, self.rules, max_pixels) for path in pictures)
        tokens = self._prompt_tokens(messages, bool(opened))
        if opened:
            found = tokens.count(self.picture_token)
            if found != len(opened):
                raise DataError(
                    f"the prompt has {found} picture tokens for {len(opened)} picture(s); write one {PLACE} for each"
                )
        return Prompt(prompt_id, tokens, opened, max_new_tokens)

    def control_words_in(self, messages: Sequence[Message], has_pictures: bool) -> Counter[str]:
        """How often each of the model's control words occurs in the messages, where it is encoded as text.

        `has_pictures`: whether the messages come with pictures.
        """
        return self._words.hidden_in(hidden_content(self._words, message, has_pictures) for message in messages)

    def _prompt_tokens(self, messages: Sequence[Message], has_pictures: bool) -> list[int]:
        """The token ids of a conversation as a prompt, with one placeholder token for each picture."""
        hidden: list[Message] = [
            {"role": message["role"], "content": hidden_content(self._words, message, has_pictures)}
            for message in messages
        ]
        template = self.tokenizer.apply_chat_template
        if not self._is_llava:
            conversation = [_message_with_parts(message) for message in hidden] if has_pictures else hidden
            return self._words.encode(template(conversation, add_generation_prompt=True, tokenize=False))
        # published LLaVAs' templates take parts only, and leave the first token to the processor, which adds it if it
        # is missing (transformers' ProcessorMixin.apply_chat_template)
        conversation = [_message_with_parts(message, self._breaks_line) for message in hidden]
        text = template(conversation, add_generation_prompt=True, tokenize=False)
        return self._words.encode(self._missing_first_token(text) + text)

    def _missing_first_token(self, text: str) -> str:
        """The tokenizer's first token as text, if it begins every text with one and this text lacks it; else empty."""
        first = self.tokenizer.bos_token
        adds = first is not None and self.tokenizer.encode("")[:1] == [self.tokenizer.bos_token_id]
        return str(first) if adds and not text.startswith(first) else ""

    @cached_property
    def _is_llava(self) -> bool:
        """Whether the model reads pictures as a LLaVA or an MGM does."""
        return isinstance(family_rules(self._model), SquareRules)

    @cached_property
    def _breaks_line(self) -> bool:
        """Whether the chat template adds a line break after a picture."""
        probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
        return f"{PLACE}\nx" in self.tokenizer.apply_chat_template(probe, tokenize=False)

    @property
    def picture_token(self) -> int:
        """Id of the token that marks a picture's place. The model must be a vision-language model."""
        if self._placeholder is None:
            self._placeholder = picture_token(self._model)
        return self._placeholder


def picture_token(model: Path) -> int:
    """Id of the token that marks a picture's place in the prompts of a vision-language model."""
    from transformers import AutoConfig

    import stages.models.mgm  # noqa: F401 - registers it with transformers

    return int(AutoConfig.from_pretrained(model, local_files_only=True).image_token_id)


def hidden_content(words: ControlWords, message: Message, has_pictures: bool) -> str:
    """A message's content, with its control words and every `<image>` that marks no picture hidden.

    An assistant's message keeps the words in `ControlWords.in_answers`. `has_pictures`: whether the message comes with
    pictures; if not, no `<image>` marks one.
    """
    kept = words.in_answers if message["role"] == "assistant" else ()
    pieces = message["content"].split(PLACE) if has_pictures else [message["content"]]
    return PLACE.join(words.hide(unescape_places(piece), kept) for piece in pieces)


def _message_with_parts(message: Message, breaks_line: bool = False) -> dict[str, Any]:
    """A message with its content as a list of texts and pictures, the form of vision-language models' chat templates.

    If the template adds a line break after a picture (`breaks_line`), the message's own line break there is removed.
    """
    parts: list[dict[str, str]] = []
    for piece in re.split(rf"({PLACE}\n?)" if breaks_line else f"({PLACE})", message["content"]):
        if piece.startswith(PLACE):
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return {"role": message["role"], "content": parts}


def load_tokenizer(model: Path) -> Any:
    """The tokenizer in a model folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True)
