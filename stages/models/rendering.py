"""Renders conversations as prompts and as sequences to learn from, with the model's chat template and picture rules.

This is the only place that turns a conversation into tokens. For training on pictures that Lorry has no rules for,
ms-swift does (`stages.train.swift`), and has to write the same. The content of messages is text. Only the template
writes control words such as `<|im_end|>`.

What an adapter learns is what inference needs: each learnt answer follows exactly the tokens that inference gives the
model for the same messages, and ends with an end token.

All engines get the same tokens and pictures of the same size. Greedy completions of two engines then differ only by the
arithmetic of their kernels.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError, UsageError
from stages.contract.records import PLACE, Message, unescape_places
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.models.chat_settings import ChatSettings, chat_settings
from stages.models.chat_template import ChatTemplate, Tools, Turn, texts_in
from stages.models.control_words import ControlWords
from stages.models.pictures import (
    Picture,
    Rules,
    SquareRules,
    family_rules,
    is_read_in_training,
    open_picture,
    rules_of,
)
from stages.models.reasoning import MARKS


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
    top_p: float = 1.0
    """Least probability that the tokens to sample from have together (nucleus sampling); 1: all tokens."""
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


UNLEARNT = -100
"""Label of a token that is not learnt, as torch's cross entropy has it."""

OTHER_TEXTS = ("reasoning_content", "tool_calls", "tool_call_id", "name")
"""Keys of a message, besides role and content, that templates write."""
PLAIN_KEYS = {"role", "content"}

_THOUGHT_MARKS = frozenset(mark for pair in MARKS for mark in pair)

GUARD = "\ue000"
"""Precedes a text to encode that begins no text: a private-use character, which joins no other into a token."""


@dataclass(frozen=True)
class TrainingSequence:
    """A conversation as training reads it."""

    tokens: list[int]
    labels: list[int]
    """As many as tokens: the token's id if it is learnt, else UNLEARNT. A label belongs to the token at its place, not
    to the token before it."""

    def repeat_placeholders(self, counts: Sequence[int], placeholder: int) -> "TrainingSequence":
        """The sequence with the n-th occurrence of `placeholder` repeated `counts[n]` times."""
        left = iter(counts)
        times = [next(left) if token == placeholder else 1 for token in self.tokens]
        pairs = zip(zip(self.tokens, self.labels, strict=True), times, strict=True)
        repeated = [pair for pair, count in pairs for _ in range(count)]
        return TrainingSequence([token for token, _ in repeated], [label for _, label in repeated])


class Renderer:
    """Turns conversations into tokens, with the chat template and the picture rules of one model.

    It can be sent to another process, which loads the files again.
    """

    def __init__(self, model: Path, settings: ChatSettings | None = None) -> None:
        """Read the chat template in a model folder. The tokenizer and the rules for pictures are loaded when they are
        needed. Raises UsageError if there is no chat template, neither in the folder nor in the settings."""
        self._model, self._settings = model, settings or ChatSettings()
        self._rules: Rules | None = None
        self._placeholder: int | None = None
        # published LLaVAs' templates take parts only
        self.template = ChatTemplate(model, self._settings, self._as_llava if self._is_llava else dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return Renderer, (self._model, self._settings)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the model folder."""
        return load_tokenizer(self._model)

    @cached_property
    def _words(self) -> ControlWords:
        """The control words of the tokenizer."""
        return ControlWords(self.tokenizer, [PLACE], self.template.source)

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
        tools: Tools | None = None,
    ) -> Prompt:
        """The prompt of a conversation, including the tokens with which the chat template begins the answer.

        The messages contain `<image>` once for each of `pictures`, in order. Each picture is scaled to at most
        `max_pixels`; None: the model's own limit. Raises DataError for a picture that cannot be read, and if the
        numbers of `<image>` and pictures differ. Raises UsageError if there are pictures, but the model reads none, and
        RefusedConversationError if the template does not accept the messages.
        """
        opened = tuple(open_picture(path, self.rules, max_pixels) for path in pictures)
        tokens = self._prompt_tokens(messages, bool(opened), tools)
        if opened:
            found = tokens.count(self.picture_token)
            if found != len(opened):
                raise DataError(
                    f"the prompt has {found} picture tokens for {len(opened)} picture(s); write one {PLACE} for each"
                )
        return Prompt(prompt_id, tokens, opened, max_new_tokens)

    def control_words_in(self, sample: Mapping[str, Any]) -> Counter[str]:
        """How often each of the model's control words occurs in a sample, where it is encoded as text."""
        has_pictures, words = bool(sample.get("images")), self._words
        messages = sample["messages"]
        texts = [hidden_content(words, message, has_pictures) for message in messages]
        others = [
            {key: message.get(key) for key in OTHER_TEXTS} for message in messages if message.keys() != PLAIN_KEYS
        ]
        if others or sample.get("tools") or sample.get("text"):
            texts += texts_in(words.hide_all([*others, sample.get("tools"), sample.get("text")]))
        return words.hidden_in(texts)

    def _prompt_tokens(self, messages: Sequence[Message], has_pictures: bool, tools: Tools | None) -> list[int]:
        """The token ids of a conversation as a prompt, with one placeholder token for each picture."""
        shape = _message_with_parts if has_pictures and not self._is_llava else None
        text = self.template.text(self._hidden(messages, has_pictures), True, shape, self._hidden_tools(tools))
        return self._words.encode(self._first_token(text) + text)

    def _hidden(self, messages: Sequence[Message], has_pictures: bool) -> list[Message]:
        """The messages as the template gets them: control words hidden, without a role that it does not have, and with
        thoughts where it takes them."""
        return [self._hidden_message(message, has_pictures) for message in self.template.folded(messages)]

    def _hidden_message(self, message: Message, has_pictures: bool) -> Message:
        """A message as the template gets it."""
        hidden: Message = {**message, "content": hidden_content(self._words, message, has_pictures)}
        if len(hidden) == 2:
            return hidden
        others: Any = {key: self._words.hide_all(message[key]) for key in OTHER_TEXTS if message.get(key)}  # type: ignore[literal-required]
        given: Any = {"role": hidden["role"], "content": hidden["content"], **others}
        return self.template.with_thoughts(given)

    def _hidden_tools(self, tools: Tools | None) -> Tools | None:
        """The tools as the template gets them."""
        return self._words.hide_all(tools) if tools else None

    def check_template(self) -> list[str]:
        """Check the chat template, without loading the tokenizer. Returns the lines of `ChatTemplate.check`.

        Raises UsageError if the template cannot be used, or would ignore a setting.
        """
        return self.template.check()

    def check_conversation(self, messages: Sequence[Message], tools: Tools | None = None) -> list[str]:
        """Check that the template writes all of a conversation with answers and without pictures, without loading the
        tokenizer. Returns what `ChatTemplate.check_conversation` returns, and raises its errors."""
        given = list[Message]()
        for message in self.template.folded(messages):
            others: Any = {key: message[key] for key in OTHER_TEXTS if message.get(key)}  # type: ignore[literal-required]
            whole: Any = {"role": message["role"], "content": message.get("content") or "", **others}
            given.append(self.template.with_thoughts(whole))
        self._turns(given, tools)
        return self.template.check_conversation(given, tools)

    def _turns(self, messages: list[Message], tools: Tools | None) -> list[Turn]:
        """Each answer of a conversation with its prompt, in order. Raises the errors of `ChatTemplate.turn`."""
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return [self.template.turn(messages[: place + 1], tools) for place in answers]

    def training_sequences(
        self,
        messages: Sequence[Message],
        only_last: bool = False,
        has_pictures: bool = False,
        tools: Tools | None = None,
    ) -> list[TrainingSequence]:
        """A conversation as sequences in which every answer, or with `only_last` the last message, is learnt exactly
        once. `has_pictures`: whether each `<image>` marks a picture, which becomes one placeholder token.

        There is one sequence if a prompt of inference holds the earlier answers as the model wrote them. Templates that
        leave out earlier thoughts need another one for each answer with thoughts. Raises the errors of
        `ChatTemplate.turn`.
        """
        hidden, tools = self._hidden(messages, has_pictures), self._hidden_tools(tools)
        if has_pictures and not self._is_llava:
            hidden = [one if one["role"] == "assistant" else _message_with_parts(one) for one in hidden]  # type: ignore[misc]
        turns = [self.template.turn(hidden, tools)] if only_last else self._turns(hidden, tools)
        parts = dict[str, list[int]]() if len(turns) > 1 else None  # of one prompt, nothing is encoded twice
        encoded = [self._encode_turn(turn, parts) for turn in turns]
        todo, found = list(range(len(turns))), list[TrainingSequence]()
        while todo:
            last = todo[-1]
            tokens = [token for part in encoded[last] for token in part]
            learnt = [place for place in todo if turns[last].text.startswith(turns[place].text)]
            learnt = [place for place in learnt if _begins_with(tokens, *encoded[place])]
            labels = [UNLEARNT] * len(tokens)
            for place in learnt:
                prompt, completion = map(len, encoded[place])
                labels[prompt : prompt + completion] = tokens[prompt : prompt + completion]
            rest = self._rest_tokens(turns[last].rest)
            found.insert(0, TrainingSequence(tokens + rest, labels + [UNLEARNT] * len(rest)))
            todo = [place for place in todo if place not in learnt]
        return found

    def text_sequences(self, text: str, max_length: int) -> list[TrainingSequence]:
        """A plain text as sequences of about the same length, at most `max_length` tokens. All tokens are learnt.

        The tokenizer's first token, if it adds one, stands before the text, and the end token after it. Raises
        UsageError for a model without an end token.
        """
        first = [self.tokenizer.bos_token_id] if self._added_first_token else []
        tokens = [*self._words.encode(self._words.hide(text)), *self._own_tokens(self.template.end_token)]
        labels, tokens = [UNLEARNT] * len(first) + tokens, first + tokens
        size = -(-len(tokens) // -(-len(tokens) // max_length))
        places = [slice(place, place + size) for place in range(0, len(tokens), size)]
        return [TrainingSequence(tokens[place], labels[place]) for place in places]

    def _encode_turn(self, turn: Turn, parts: dict[str, list[int]] | None) -> tuple[list[int], list[int]]:
        """The tokens of a turn's prompt, which are those of inference, and of its completion. `parts` has the tokens
        that the conversation's prompts share; None: there is one prompt."""
        prompt = self._first_token(turn.prompt) + turn.prompt
        tokens = self._words.encode(prompt) if parts is None else self._words.encode_parts(prompt, parts)
        return tokens, self._following_tokens(prompt, turn.completion)

    def _following_tokens(self, before: str, text: str) -> list[int]:
        """The tokens of a text that follows the tokens of another one.

        They are those that the tokenizer gives both texts together, unless it joins the end of the one with the
        beginning of the other.
        """
        for beginning in (before[self._words.starts(before) :], GUARD):
            tokens, own = self._words.encode(beginning + text), self._own_tokens(beginning)
            if tokens[: len(own)] == own:
                return tokens[len(own) :]
        return self._words.encode(text)

    def _own_tokens(self, text: str) -> list[int]:
        """The tokens of a text, the same for many samples."""
        if text not in self._constant:
            if len(self._constant) > 1000:
                self._constant.clear()
            self._constant[text] = self._words.encode(text)
        return self._constant[text]

    @cached_property
    def _constant(self) -> dict[str, list[int]]:
        """Tokens of texts that many samples share."""
        return {}

    def _rest_tokens(self, rest: str) -> list[int]:
        """The tokens of what the template writes after the last end token."""
        end = self.template.end_words[0]
        return self._own_tokens(end + rest)[len(self._own_tokens(end)) :] if rest else []

    def _first_token(self, text: str) -> str:
        """The tokenizer's first token as text, if the template leaves it to Lorry and the text lacks it; else empty.

        Lorry's own templates leave it, and those of published LLaVAs, whose processor adds it (transformers'
        ProcessorMixin.apply_chat_template).
        """
        first = self._added_first_token if self._is_llava or self._settings.named else ""
        return first if not text.startswith(first) else ""

    @cached_property
    def _added_first_token(self) -> str:
        """The token that the tokenizer adds at the beginning of every text, as text; empty if it adds none."""
        first = self.tokenizer.bos_token
        adds = first is not None and self.tokenizer.encode("")[:1] == [self.tokenizer.bos_token_id]
        return str(first) if adds else ""

    def _as_llava(self, message: Message) -> dict[str, Any]:
        """A message in the form of published LLaVAs' templates."""
        return _message_with_parts(message, self._breaks_line)

    @cached_property
    def _is_llava(self) -> bool:
        """Whether the model reads pictures as a LLaVA or an MGM does."""
        return isinstance(family_rules(self._model), SquareRules)

    @cached_property
    def _breaks_line(self) -> bool:
        """Whether the chat template adds a line break after a picture."""
        probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
        return f"{PLACE}\nx" in self.template.text(probe, False)

    @property
    def picture_token(self) -> int:
        """Id of the token that marks a picture's place. The model must be a vision-language model."""
        if self._placeholder is None:
            self._placeholder = picture_token(self._model)
        return self._placeholder


def checked_renderer(stage: Stage) -> Renderer:
    """The renderer of a run's model, after a check of its chat template. No tokenizer is loaded yet.

    Prints what is unusual about the template, and adds what changes prompts to the manifest as `chat`. Raises
    UsageError if the template cannot be used, or would ignore a setting.
    """
    settings = chat_settings(stage.run)
    renderer = Renderer(stage.run.roots.models / stage.run.recipe.model.path, settings)
    for line in renderer.check_template():
        stage.events.say(line)
    system = {} if renderer.template.has_system_role else {"system": "in the user's message"}
    if facts := {**settings.facts, **system}:
        stage.facts["chat"] = facts
    return renderer


def check_samples(run: Run, renderer: Renderer, samples: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Check that training can render a sample without pictures of each form, and the first one with pictures. Returns
    what the chat template does not write as it is, each with the number of its messages.

    The form of a conversation is the order of its roles, and which messages have a text, thoughts or tool calls. Raises
    UsageError if the chat template refuses one or leaves out a part of it, or Lorry has no rules for the pictures and
    the recipe does not name ms-swift's model type and template, and DataError for a conversation without an answer.
    """
    names = run.recipe.model
    has_rules = is_read_in_training(run.roots.models / names.path)
    forms, changes = set(), Counter[str]()
    for sample in samples:
        missing = [key for key in ("swift_type", "swift_template") if getattr(names, key) is None]
        if sample["images"] and missing and not has_rules:
            raise UsageError(
                f"model.{missing[0]}: found null, but sample {sample['id']} has pictures, which Lorry itself reads for"
                " the Qwen2-VL family, LLaVA and MGM; set it to ms-swift's name for this model"
            )
        if sample["images"] or sample.get("text") is not None:
            continue
        if all(message["role"] != "assistant" for message in sample["messages"]):
            raise DataError(f"sample {sample['id']}: has no answer to learn; run preprocess again")
        form = _form_of(sample)
        if form not in forms:
            forms.add(form)
            try:
                changed = renderer.check_conversation(sample["messages"], sample.get("tools"))
            except UsageError as error:
                raise UsageError(f"sample {sample['id']}: {error}") from error
            changes.update(f"{role} messages that the chat template changes" for role in changed)
        changes.update(_unwritten(renderer.template, sample["messages"]))
    return dict(changes)


def _form_of(sample: Mapping[str, Any]) -> tuple[Any, ...]:
    """The form of a conversation: what a template's refusal depends on."""
    parts = (
        (message["role"], bool(message.get("content")), bool(message.get("reasoning_content")), len(calls))
        for message in sample["messages"]
        for calls in [message.get("tool_calls") or ()]
    )
    return bool(sample.get("tools")), *parts


def _unwritten(template: ChatTemplate, messages: Sequence[Message]) -> Iterator[str]:
    """Yield, for each message of which the template leaves out something, what it leaves out."""
    for message in template.folded(messages) if template.stripped_roles else messages:
        content = message.get("content") or ""
        if message["role"] in template.stripped_roles and content != content.strip():
            yield "messages whose outer white space the chat template strips"
        if message.get("reasoning_content") and not template.knows_thoughts:
            yield "answers whose reasoning_content the chat template leaves out"
        if message.get("tool_calls") and content and not template.writes_text_beside_calls:
            yield "answers whose text beside tool calls the chat template leaves out"


def _begins_with(tokens: list[int], *parts: list[int]) -> bool:
    """Whether tokens begin with these parts, one after the other."""
    beginning = [token for part in parts for token in part]
    return tokens[: len(beginning)] == beginning


def picture_token(model: Path) -> int:
    """Id of the token that marks a picture's place in the prompts of a vision-language model."""
    from transformers import AutoConfig

    import stages.models.mgm  # noqa: F401 - registers it with transformers

    return int(AutoConfig.from_pretrained(model, local_files_only=True).image_token_id)


def hidden_content(words: ControlWords, message: Message, has_pictures: bool) -> str:
    """A message's content, with its control words and every `<image>` that marks no picture hidden.

    An assistant's message keeps the words in `ControlWords.in_answers`, without those around thoughts if it has its
    thoughts elsewhere. `has_pictures`: whether the message comes with pictures; if not, no `<image>` marks one.
    """
    kept = words.in_answers if message["role"] == "assistant" else frozenset()
    if message.get("reasoning_content"):
        kept -= _THOUGHT_MARKS
    content = message.get("content") or ""
    pieces = content.split(PLACE) if has_pictures else [content]
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
    return {**message, "content": parts}


def load_tokenizer(model: Path) -> Any:
    """The tokenizer in a model folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True)
