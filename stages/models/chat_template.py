"""The chat template of a model: the text that it writes for a conversation, and what it can express.

A chat template is a Jinja text in a model's folder (https://huggingface.co/docs/transformers/chat_templating). It is
rendered here as transformers renders it, but transformers, which takes seconds to import, is not needed. A stage can
therefore check a template before it loads anything.

What a template can express is found by rendering, not from the name of a model.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.files import read_json
from stages.contract.records import Message
from stages.models.chat_settings import CHATML, NAMED, ChatSettings, read_template

THINK, THOUGHT = "<think>", "</think>"
"""The words around a reasoning model's thoughts."""

MARK, QUESTION = "\ue001", "\ue002"
"""Contents of messages that probe a template: private-use characters, which no template writes."""

Shape = Callable[[Message], Mapping[str, Any]]
"""The form in which a template gets a message: with its content as text, or as a list of texts and pictures."""


@dataclass(frozen=True)
class Turn:
    """One answer of a conversation, and what the model gets before it, as text."""

    prompt: str
    """The prompt of inference: all before the answer, with the template's beginning of the answer."""
    completion: str
    """What the model has to write: the answer and its end token, and thoughts where the model thinks."""
    rest: str
    """What the template writes after the end token of the last answer."""

    @property
    def text(self) -> str:
        """Prompt and completion."""
        return self.prompt + self.completion


class ChatTemplate:
    """The chat template of one model, with the settings of a run."""

    def __init__(self, model: Path, settings: ChatSettings, shape: Shape = dict) -> None:
        """Read the template of a model folder. `shape` is the form in which it gets messages.

        Raises UsageError if neither the folder nor the settings have a template, or the template is not Jinja.
        """
        self._model, self._settings, self._shape = model, settings, shape
        text = settings.template or read_template(model)
        if text is None:
            raise UsageError(
                f"{model}: has no chat template, as is usual for a base model; set model.chat_template to"
                f" {' or '.join(NAMED)}, or to a .jinja file below the model mount"
            )
        self.source = text
        """The template itself, as Jinja text."""
        self._config = read_json(model / "tokenizer_config.json") or {}
        day = datetime.fromisoformat(settings.date) if settings.date else datetime.now()
        self._variables: dict[str, Any] = {**self.special_tokens, "strftime_now": day.strftime}
        if settings.enable_thinking is not None:
            self._variables["enable_thinking"] = settings.enable_thinking
        self._template = self._compile()

    def _compile(self) -> Any:
        """The compiled template. Raises UsageError if it is not Jinja."""
        from jinja2 import TemplateError

        try:
            return _compiled(self.source)
        except TemplateError as error:
            raise self._refusal(f"the chat template is not Jinja ({error})") from error

    def _refusal(self, found: str) -> UsageError:
        """The error for a template that cannot be used. `found` says why."""
        return UsageError(f"{self._model}: {found}; set model.chat_template to a .jinja file with a corrected template")

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The tokenizer's special tokens by their names, such as `eos_token`, which a template can write."""
        values = {**(read_json(self._model / "special_tokens_map.json") or {}), **self._config}
        words = {name: value for name, value in values.items() if name.endswith("_token")}
        found = {name: value["content"] if isinstance(value, dict) else value for name, value in words.items()}
        if not isinstance(found.get("eos_token"), str) and self._configured_ends:  # a default of its class
            found["eos_token"] = self.added_words.get(self._configured_ends[0])
        return {name: value for name, value in found.items() if isinstance(value, str)}

    @cached_property
    def added_words(self) -> dict[int, str]:
        """The words that were added to the tokenizer's vocabulary, such as control words, by id."""
        tokens = {int(number): token for number, token in self._config.get("added_tokens_decoder", {}).items()}
        listed = (read_json(self._model / "tokenizer.json") or {}).get("added_tokens", [])
        tokens |= {int(token["id"]): token for token in listed}
        return {number: str(token["content"]) for number, token in tokens.items()}

    @cached_property
    def end_words(self) -> tuple[str, ...]:
        """The words at which inference stops: the tokenizer's end token, and those of the generation config."""
        words = [self.special_tokens.get("eos_token"), *map(self.added_words.get, self._configured_ends)]
        return tuple(dict.fromkeys(word for word in words if word))

    @cached_property
    def _configured_ends(self) -> list[int]:
        """The ids of the end tokens in the generation config or, without one, in the model's config."""
        found = (read_json(self._model / "generation_config.json") or {}).get("eos_token_id")
        if found is None:
            config = read_json(self._model / "config.json") or {}
            found = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
        return [number for number in (found if isinstance(found, list) else [found]) if number is not None]

    def text(self, messages: Sequence[Any], add_generation_prompt: bool, shape: Shape | None = None) -> str:
        """The text of a conversation; with `add_generation_prompt`, with the beginning of the next answer.

        Raises UsageError if the template does not accept the conversation.
        """
        from jinja2 import TemplateError

        form = shape or self._shape
        shaped = [form(message) if isinstance(message["content"], str) else message for message in messages]
        try:
            return str(
                self._template.render(
                    messages=shaped,
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._variables,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise self._refusal(f"the chat template refuses a conversation of {roles} ({error})") from error

    # -- the system message ------------------------------------------------------------------------------------

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template writes a system message."""
        try:
            return MARK in self.text([_message("system", MARK), _message("user", QUESTION)], True)
        except UsageError:
            return False

    def folded(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, with the system message in the first user's message if the template has no system role."""
        if not messages or messages[0]["role"] != "system" or self.has_system_role:
            return list(messages)
        system, *others = messages
        place = next((place for place, message in enumerate(others) if message["role"] == "user"), None)
        if place is None or not system["content"]:
            return others
        content = f"{system['content']}\n\n{others[place]['content']}"
        return [*others[:place], {**others[place], "content": content}, *others[place + 1 :]]

    # -- answers -----------------------------------------------------------------------------------------------

    def turn(self, messages: Sequence[Message]) -> Turn:
        """The last message, an answer, and its prompt. Control words in the contents must be hidden.

        The prompt is that of inference, also where the template writes the same messages otherwise once they have an
        answer. The thoughts of the answer are learnt, also where the template leaves them out of finished turns, except
        after a prompt that ends them. Where the template writes no end token after an answer, the tokenizer's is added.
        Raises UsageError if the template does not accept the conversation or changes the answer, and for a model
        without an end token.
        """
        *asked, answer = messages
        prompt = self.text(asked, True)
        thoughts, thought, said = self._split_thoughts(answer["content"])
        if self._thinking == "ended":
            thoughts = thought = ""
        marked = self.text([*asked, {**answer, "content": thoughts + MARK}], False)
        before, mark, after = marked.rpartition(MARK)
        whole = self.text([*asked, {**answer, "content": thoughts + said}], False)
        if not mark or not whole.startswith(before) or not whole[len(before) :].endswith(after):
            raise self._refusal("the chat template does not write an answer as it is")
        written = whole[len(before) : len(whole) - len(after)]
        if written.strip() != said.strip():
            raise self._refusal(f"the chat template writes the answer {said[:80]!r} as {written[:80]!r}")
        lead = before[len(prompt) :] if before.startswith(prompt) else self._lead
        if self._thinking == "begun" and THOUGHT not in lead:
            lead = f"{thought}\n{THOUGHT}\n\n"
        elif thought and THOUGHT not in lead:
            lead = f"{THINK}\n{thought}\n{THOUGHT}\n\n"
        end = _end_of_turn(after, self.end_words)
        if end is None:
            return Turn(prompt, lead + written + self._end_token, "")
        return Turn(prompt, lead + written + after[:end], after[end:])

    def _split_thoughts(self, content: str) -> tuple[str, str, str]:
        """The part of an answer up to the end of its thoughts, the thoughts in it, and the rest, which is the answer.

        The first two are empty if there are no thoughts, or if the template does not know them.
        """
        before, thought_end, said = content.rpartition(THOUGHT)
        if not thought_end or THOUGHT not in self.source:
            return "", "", content
        answer = said.lstrip("\n")
        thought = before.partition(THINK)[2] if THINK in before else before
        return content[: len(content) - len(answer)], thought.strip("\n"), answer

    @cached_property
    def _thinking(self) -> str:
        """Where a prompt leaves the model's thoughts: `begun`, `ended`, or `free` if the prompt has none."""
        start = self.text([_message("user", QUESTION)], True).rpartition(QUESTION)[2]
        begun, ended = start.rfind(THINK), start.rfind(THOUGHT)
        return "free" if begun == ended else "begun" if begun > ended else "ended"

    @cached_property
    def _lead(self) -> str:
        """What the template writes between a prompt and the answer, as in a finished turn; empty if it is unclear."""
        asked = [_message("user", QUESTION)]
        prompt, marked = self.text(asked, True), self.text([*asked, _message("assistant", MARK)], False)
        before = marked.rpartition(MARK)[0]
        return before[len(prompt) :] if before.startswith(prompt) else ""

    @property
    def _end_token(self) -> str:
        """The end token of an answer after which the template writes none. Raises UsageError if the model has none."""
        if not self.end_words:
            raise UsageError(
                f"{self._model}: neither tokenizer nor generation config has an end token, so the tuned model would"
                " never stop; set eos_token in tokenizer_config.json"
            )
        return self.end_words[0]

    # -- checks ------------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """Check the template with a short conversation. Returns lines that say where prompts differ from what one
        would expect.

        Raises UsageError if the template cannot be used, or would ignore a setting.
        """
        lines = []
        asked = [_message("user", QUESTION)]
        if QUESTION not in self.text(asked, True):
            raise self._refusal("the chat template leaves out the user's message")
        self.turn([*asked, _message("assistant", "yes")])
        after = self.text([*asked, _message("assistant", MARK)], False).rpartition(MARK)[2]
        if _end_of_turn(after, self.end_words) is None:
            lines.append(f"the chat template writes no end token after an answer: training adds {self._end_token!r}")
        if self._settings.named and self.source == CHATML and "<|im_end|>" not in self.added_words.values():
            raise UsageError(
                f"model.chat_template: found 'chatml', but the tokenizer in {self._model} has no token <|im_end|>; set"
                " it to plain"
            )
        if not self.has_system_role:
            lines.append("the chat template has no system role: the system message goes into the user's message")
        if self._settings.enable_thinking is not None:
            self._refuse_ignored_thinking()
        if self._settings.date is not None:
            lines.append(f"the chat template writes a date: every prompt of this run has {self._settings.date}")
        return lines

    def _refuse_ignored_thinking(self) -> None:
        """Raise UsageError if the template writes the same prompts with either value of `enable_thinking`."""
        found = set()
        for value in (True, False):
            self._variables["enable_thinking"] = value
            user = _message("user", QUESTION)
            asked = [[user], [_message("system", MARK), user]] if self.has_system_role else [[user]]
            found.add(tuple(self.text(messages, True) for messages in asked))
        wanted = self._variables["enable_thinking"] = self._settings.enable_thinking
        if len(found) == 1:
            raise UsageError(
                f"model.enable_thinking: found {str(wanted).lower()}, but the chat template of {self._model} ignores"
                " it; set it to null"
            )


def _end_of_turn(after: str, end_words: Sequence[str]) -> int | None:
    """The place after the first end token in the text after an answer; None if it has none."""
    return min((after.find(word) + len(word) for word in end_words if word in after), default=None)


def _message(role: str, content: str) -> Message:
    """A message."""
    return {"role": role, "content": content}


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    """A compiled template. The environment is transformers' (`transformers.utils.chat_template_utils`)."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The tag `generation`, which marks what the model writes. Its content is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 - as its base class has it

        def parse(self, parser: Any) -> nodes.Node:
            """The node of a tag and its content."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Callable[[], str]) -> str:
            """The rendered content of a tag."""
            return caller()

    def raise_exception(message: str) -> None:
        """Raise the error with which a template refuses a conversation."""
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        """A value as JSON. Unlike Jinja's own filter, it does not escape HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)
