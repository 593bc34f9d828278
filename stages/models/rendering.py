"""Conversations rendered to prompts: tokens by the model's own chat template, pictures by the model's own rules.

Every engine gets the same tokens, and pictures of the same size, so that greedy answers of two engines differ only by
the arithmetic of their kernels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError
from stages.contract.records import Message
from stages.models.pictures import Picture, Rules, SquareRules, family_rules, open_picture, rules_of

PLACEHOLDER = "<image>"
"""Where a picture stands in a message: ms-swift's word for it."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    id: str
    tokens: list[int]
    """One placeholder for each picture."""
    pictures: tuple[Picture, ...] = ()
    max_new_tokens: int | None = None
    """None: as many as the engine's settings say."""
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0
    """Of the random numbers where it is not: the same prompt with the same seed gives the same answer, whatever is
    computed beside it."""

    @property
    def length(self) -> int:
        """Tokens of the prompt, those of its pictures included."""
        return len(self.tokens) + sum(picture.tokens - 1 for picture in self.pictures)

    def repeat_placeholders(self, counts: Sequence[int], placeholder: int) -> list[int]:
        """The tokens with as many placeholders for each picture as `counts` says."""
        left = iter(counts)
        return [same for token in self.tokens for same in [token] * (next(left) if token == placeholder else 1)]


class Renderer:
    """Turns conversations into prompts, by the chat template and the picture rules of one model."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = load_tokenizer(model)
        self._model = model
        self._rules: Rules | None = None
        self._placeholder: int | None = None

    @property
    def rules(self) -> Rules:
        """How the model reads pictures. Raises UsageError for a model that reads none, or reads them otherwise."""
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
        """Tokens of a conversation, with the beginning of the answer that the chat template asks for.

        The messages hold `<image>` once for each of `pictures`, each of which gets at most `max_pixels`. Raises
        DataError where a picture cannot be read or the text itself holds a picture's token.
        """
        opened = tuple(open_picture(path, self.rules, max_pixels) for path in pictures)
        tokens = self._tokens_of(messages, bool(opened))
        if opened:
            found = tokens.count(self.picture_token)
            if found != len(opened):
                raise DataError(f"{found} places for pictures in the prompt, and {len(opened)} pictures")
        return Prompt(prompt_id, tokens, opened, max_new_tokens)

    def _tokens_of(self, messages: Sequence[Message], shows: bool) -> list[int]:
        template = self.tokenizer.apply_chat_template
        if not self._is_llava:
            conversation = [_with_parts(message) for message in messages] if shows else list(messages)
            return list(template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False))
        # published LLaVAs' templates take parts only and leave the first token to the processor, which adds it unless
        # it is there (transformers' ProcessorMixin.apply_chat_template)
        conversation = [_with_parts(message, self._breaks_line) for message in messages]
        text = template(conversation, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer.encode(self._begins_with(text) + text, add_special_tokens=False))

    def _begins_with(self, text: str) -> str:
        """The token that every text begins with, where it is to be added."""
        first = self.tokenizer.bos_token
        adds = first is not None and self.tokenizer.encode("")[:1] == [self.tokenizer.bos_token_id]
        return str(first) if adds and not text.startswith(first) else ""

    @cached_property
    def _is_llava(self) -> bool:
        return isinstance(family_rules(self._model), SquareRules)

    @cached_property
    def _breaks_line(self) -> bool:
        """Whether the chat template itself ends the line after a picture."""
        probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
        return f"{PLACEHOLDER}\nx" in self.tokenizer.apply_chat_template(probe, tokenize=False)

    @property
    def picture_token(self) -> int:
        """The number of the token that stands for a picture."""
        if self._placeholder is None:
            self._placeholder = picture_token(self._model)
        return self._placeholder


def picture_token(model: Path) -> int:
    """The number of the token that stands for a picture."""
    from transformers import AutoConfig

    import stages.models.mgm  # noqa: F401 - makes it known to transformers

    return int(AutoConfig.from_pretrained(model, local_files_only=True).image_token_id)


def _with_parts(message: Message, breaks_line: bool = False) -> dict[str, Any]:
    """A message whose content is a list of texts and pictures, as chat templates of vision-language models read it.

    Where such a template `breaks_line` after a picture, the line's end that follows it in the message is that one.
    """
    parts: list[dict[str, str]] = []
    for piece in re.split(rf"({PLACEHOLDER}\n?)" if breaks_line else f"({PLACEHOLDER})", message["content"]):
        if piece.startswith(PLACEHOLDER):
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return {"role": message["role"], "content": parts}


def load_tokenizer(model: Path) -> Any:
    """The model's own tokenizer, from its folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True)
