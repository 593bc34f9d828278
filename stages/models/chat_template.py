"""The chat template of a model: the text that it writes for a conversation, and what it can express.

A chat template is a Jinja text in a model's folder (https://huggingface.co/docs/transformers/chat_templating). It is
rendered here as transformers renders it, but transformers, which takes seconds to import, is not needed. A stage can
therefore check a template before it loads anything.

What a template can express is found by rendering, not from the name of a model.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.files import digest_of, read_json
from stages.contract.records import Message
from stages.models.chat_settings import CHATML, NAMED, ChatSettings, read_template
from stages.models.reasoning import MARKS

MARK, QUESTION = "\ue001", "\ue002"
"""Contents of messages that probe a template: private-use characters, which no template writes."""

Shape = Callable[[Message], Mapping[str, Any]]
"""The form in which a template gets a message: with its content as text, or as a list of texts and pictures."""

Tools = Sequence[Mapping[str, Any]]
"""The tools that a model may call, in OpenAI's form."""

PROBE = "lorry_probe"
"""Name of a tool and of its argument in a conversation that probes a template: no private-use characters, which JSON
and Python may write otherwise."""
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE,
        "description": PROBE,
        "parameters": {
            "type": "object",
            "properties": {PROBE: {"type": "integer", "description": PROBE}},
            "required": [PROBE],
        },
    },
}
"""The tool that such a conversation calls."""
PROBE_ID = "call_1"
"""Its id, shorter than Mistral's templates accept."""
ID_LENGTH = 9
"""Length of the ids of tool calls that Mistral's templates accept."""


class RefusedConversationError(UsageError):
    """The chat template does not accept a conversation."""


@dataclass(frozen=True)
class CallForm:
    """The form in which a template writes tool calls whole; published templates differ."""

    empty: str | None
    """Content of a message that only calls tools. None: calls beside a text are left out (DeepSeek)."""
    has_text: bool
    """Whether arguments are JSON text; else an object."""
    has_short_ids: bool
    """Whether ids must have ID_LENGTH characters."""


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

    def _refusal(self, found: str, kind: type[UsageError] = UsageError) -> UsageError:
        """The error for a template that cannot be used. `found` says why."""
        return kind(f"{self._model}: {found}; set model.chat_template to a .jinja file with a corrected template")

    def _loss(self, lost: str) -> UsageError:
        """The error for a template that does not write all of a conversation with tools. `lost` is what is missing."""
        return RefusedConversationError(
            f"{self._model}: the chat template leaves out {lost}; set model.chat_template to a .jinja file that writes"
            " it, or take such conversations out of the data"
        )

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

    def text(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool,
        shape: Shape | None = None,
        tools: Tools | None = None,
    ) -> str:
        """The text of a conversation; with `add_generation_prompt`, with the beginning of the next answer.

        Raises RefusedConversationError if the template does not accept the conversation.
        """
        form = shape or self._shape
        return self._rendered([self._shaped(message, form) for message in messages], add_generation_prompt, tools)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, tools: Tools | None) -> str:
        """What the template writes for messages in its own form. Raises the error of `text`."""
        from jinja2 import TemplateError

        try:
            return str(
                self._template.render(
                    messages=messages,
                    tools=tools or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._variables,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise self._refusal(
                f"the chat template refuses a conversation of {roles} ({' '.join(str(error).split())})",
                RefusedConversationError,
            ) from error

    def _shaped(self, message: Any, form: Shape) -> Mapping[str, Any]:
        """A message in the form that the template takes."""
        if message.get("tool_calls"):
            message = self._with_calls(message)
        elif "tool_call_id" in message:
            message = {**message, "tool_call_id": self._short_id(message["tool_call_id"])}
        return form(message) if isinstance(message.get("content"), str) else message

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

    def turn(self, messages: Sequence[Message], tools: Tools | None = None) -> Turn:
        """The last message, an answer, and its prompt. Control words in the contents must be hidden.

        The prompt is that of inference, also where the template writes the same messages otherwise once they have an
        answer. The thoughts of the answer are learnt, also where the template leaves them out of finished turns, except
        after a prompt that ends them. Where the template writes no end token after an answer, the tokenizer's is added.
        Raises UsageError if the template does not accept the conversation, changes the answer or leaves out a tool
        call, and for a model without an end token.
        """
        *asked, answer = messages
        prompt = self.text(asked, True, tools=tools)
        thoughts, thought, said = self._split_thoughts(answer.get("content") or "")
        if self._thinking(prompt) == "ended":
            thoughts = thought = ""
        if answer.get("tool_calls"):
            calling: Message = {**answer, "content": thoughts + said}
            return self._calling_turn(prompt, asked, calling, thought, tools)
        whole = self.text([*asked, {**answer, "content": thoughts + said}], False, tools=tools)
        lead, after = self._around or ("", "")
        written = said
        if thoughts or self._around is None or whole != f"{prompt}{lead}{said}{after}":  # else they are as usual
            marked = self.text([*asked, {**answer, "content": thoughts + MARK}], False, tools=tools)
            before, mark, after = marked.rpartition(MARK)
            if not mark or not whole.startswith(before) or not whole[len(before) :].endswith(after):
                raise self._refusal("the chat template does not write an answer as it is")
            written = whole[len(before) : len(whole) - len(after)]
            if written.strip() != said.strip():
                raise self._refusal(f"the chat template writes the answer {said[:80]!r} as {written[:80]!r}")
            lead = before[len(prompt) :] if before.startswith(prompt) else lead
        lead = self._with_thought(prompt, lead, thought)
        end = _end_of_turn(after, self.end_words)
        if end is None:
            return Turn(prompt, lead + written + (self._end_of_next or self.end_token), "")
        return Turn(prompt, lead + written + after[:end], after[end:])

    def _with_thought(self, prompt: str, lead: str, thought: str) -> str:
        """What stands between a prompt and the answer: `lead`, which the template writes there, or the answer's thought
        if the template leaves it out."""
        (begin, end), is_begun = self.thought_marks, self._thinking(prompt) == "begun"
        if end in lead or (not thought and not is_begun):
            return lead
        return f"{thought}\n{end}\n\n" if is_begun else f"{begin}\n{thought}\n{end}\n\n"

    def _split_thoughts(self, content: str) -> tuple[str, str, str]:
        """The part of an answer up to the end of its thoughts, the thoughts in it, and the rest, which is the answer.

        The first two are empty if there are no thoughts, or if the template does not know them.
        """
        begin, end = self.thought_marks
        before, thought_end, said = content.rpartition(end)
        if not thought_end or end not in self.source:
            return "", "", content
        answer = said.lstrip("\n")
        thought = before.partition(begin)[2] if begin in before else before
        return content[: len(content) - len(answer)], thought.strip("\n"), answer

    @cached_property
    def thought_marks(self) -> tuple[str, str]:
        """The words around a model's thoughts, such as `<think>` and `</think>`: those that the template names."""
        return next((pair for pair in MARKS if pair[1] in self.source), MARKS[0])

    def _thinking(self, prompt: str) -> str:
        """Where a prompt leaves the model's thoughts: `begun`, `ended`, or `free` if its end says nothing of them.

        A template that ends them after a question has them ended after the result of a tool call too.
        """
        if self._ends_thoughts:
            return "ended"
        return "begun" if prompt.rstrip().endswith(self.thought_marks[0]) else "free"

    @cached_property
    def _ends_thoughts(self) -> bool:
        """Whether prompts end the model's thoughts."""
        return self.text([_message("user", QUESTION)], True).rstrip().endswith(self.thought_marks[1])

    def _without_thoughts(self, prompt: str) -> str:
        """A prompt up to the marks of thoughts with which it ends."""
        for mark in reversed(self.thought_marks):
            prompt = bare.removesuffix(mark) if (bare := prompt.rstrip()).endswith(mark) else prompt
        return prompt

    @cached_property
    def _thoughts_key(self) -> str | None:
        """The key of a message under which the template takes thoughts that are not in its content; None: under no
        key."""
        asked, answer = (self._shape(_message(role, QUESTION)) for role in ("user", "assistant"))
        for key in ("reasoning_content", "thinking"):
            if MARK in self._rendered([asked, {**answer, key: MARK}], False, None):
                return key
        return None

    @cached_property
    def _keeps_breaks(self) -> bool:
        """Whether the template leaves out the thoughts of earlier turns, but not the line breaks after them."""
        begin, end = self.thought_marks
        asked = _message("user", QUESTION)
        answer = _message("assistant", f"{begin}\n{QUESTION}\n{end}\n\n{MARK}")
        before = self.text([asked, answer, asked], True).partition(MARK)[0]
        return before.endswith("\n\n") and before.count(QUESTION) == 1

    @property
    def knows_thoughts(self) -> bool:
        """Whether the template, or Lorry after its prompts, writes thoughts (`reasoning_content`)."""
        return self.thought_marks[1] in self.source or self._thoughts_key is not None

    def with_thoughts(self, message: Message) -> Message:
        """An answer with its `reasoning_content` where the template takes it: in the content, or under a key of its
        own. A template that knows no thoughts gets none."""
        thought = message.get("reasoning_content")
        if thought is None:
            return message
        others: Any = {key: value for key, value in message.items() if key != "reasoning_content"}
        content = message.get("content") or ""
        begin, end = self.thought_marks
        if end in self.source:
            thought, breaks = thought.strip("\n"), ("", "") if self._keeps_breaks else ("\n", "\n\n")
            others["content"] = f"{begin}{breaks[0]}{thought}{breaks[0]}{end}{breaks[1]}{content}"
        elif self._thoughts_key is not None:
            others[self._thoughts_key] = thought
        found: Message = others
        return found

    @cached_property
    def _around(self) -> tuple[str, str] | None:
        """What the template writes between a prompt and the answer, as in a finished turn, and after it; None if it is
        unclear."""
        asked = [_message("user", QUESTION)]
        prompt, marked = self.text(asked, True), self.text([*asked, _message("assistant", MARK)], False)
        before, mark, after = marked.rpartition(MARK)
        return (before[len(prompt) :], after) if mark and before.startswith(prompt) else None

    @cached_property
    def _end_of_next(self) -> str | None:
        """The end token with which the next user's turn begins (GLM-4), for a template that ends no answer with one."""
        asked = _message("user", QUESTION)
        return self._end_between([asked, _message("assistant", MARK)], asked)

    @cached_property
    def _end_of_result(self) -> str | None:
        """The end token with which the result of a tool call begins, as `_end_of_next`."""
        return self._end_between([_message("user", QUESTION), _calling(PROBE)], _result(MARK))

    def _end_between(self, messages: Sequence[Message], following: Message) -> str | None:
        """The end token with which the template begins a message that follows others; None if with none."""
        try:
            before, whole = self.text(messages, False), self.text([*messages, following], False)
        except RefusedConversationError:
            return None
        begun = whole[len(before.rstrip()) :].lstrip() if whole.startswith(before.rstrip()) else ""
        return next((word for word in self.end_words if begun.startswith(word)), None)

    # -- tool calls --------------------------------------------------------------------------------------------

    def _calling_turn(
        self, prompt: str, asked: Sequence[Message], answer: Message, thought: str, tools: Tools | None
    ) -> Turn:
        """An answer that calls tools, and its prompt. Raises the errors of `turn`."""
        written = self._after_prompt(prompt, asked, answer, tools)
        for call in answer["tool_calls"]:
            self._refuse_lost_call(call, written)
        if self.thought_marks[1] not in written:
            written = self._with_thought(prompt, "", thought) + written
        elif thought not in written:  # the template ends the thoughts that the prompt begins
            written = f"{thought}\n{written.lstrip()}"
        place = written.rfind(str(answer["tool_calls"][-1]["function"]["name"]))
        end = _end_of_turn(written[place:], self.end_words)
        if end is None:
            return Turn(prompt, written.rstrip("\n") + (self._end_of_result or self.end_token), "")
        return Turn(prompt, written[: place + end], written[place + end :])

    def _after_prompt(self, prompt: str, asked: Sequence[Message], answer: Message, tools: Tools | None) -> str:
        """What the template writes of the last answer and after it, in a finished conversation.

        Some templates write the messages before it otherwise than in a prompt, such as without the system message. Then
        the answer has to be the same as after another question.
        """
        whole = self.text([*asked, answer], False, tools=tools)
        for begun in (prompt, self._without_thoughts(prompt)):
            if whole.startswith(begun):
                return whole[len(begun) :]
        short = [_message("user", QUESTION)]
        begun = self._without_thoughts(self.text(short, True, tools=tools))
        again = self.text([*short, answer], False, tools=tools)
        if not again.startswith(begun) or not whole.endswith(again[len(begun) :]):
            raise self._refusal("the chat template does not write a tool call after the prompt of inference")
        return again[len(begun) :]

    def _refuse_lost_call(self, call: Mapping[str, Any], written: str) -> None:
        """Raise UsageError if a text lacks the name of a tool call or a text in its arguments."""
        name = str(call["function"]["name"])
        for text in (name, *texts_in(call["function"].get("arguments"))):
            if not _is_written(text, written):
                raise self._loss(f"{'the tool call' if text == name else f'{text[:80]!r} in a call of'} {name!r}")

    @cached_property
    def _call_form(self) -> CallForm | None:
        """The form of tool calls that the template writes whole, and with the least besides; None if it writes none."""
        asked, found = self._shape(_message("user", QUESTION)), list[tuple[int, CallForm]]()
        for empty, has_text, has_short_ids in product(("", None), (False, True), (False, True)):
            form = CallForm(empty, has_text, has_short_ids)
            calls = [_call_in_form(call, form) for call in _calling("")["tool_calls"]]
            answer = {"role": "assistant", "content": empty, "tool_calls": calls}
            try:
                text = self._rendered([asked, answer], False, [PROBE_TOOL])
            except RefusedConversationError:
                continue
            after = text.rpartition(QUESTION)[2]
            # an object that a template writes as text is Python's repr of it
            if after.count(PROBE) > 1 and repr({PROBE: 1}) not in after:
                found.append((len(after), form))
        return min(found, key=lambda one: one[0])[1] if found else None

    def _with_calls(self, message: Message) -> Message:
        """A message in the form in which the template writes tool calls; as it is if the template writes none."""
        form, content = self._call_form, message.get("content") or ""
        if form is None:
            return {**message, "content": content}
        if form.empty is None or not self._takes_thoughts_of_calls:
            content = self._split_thoughts(content)[2]
        calls = [_call_in_form(call, form) for call in message["tool_calls"]]
        return {**message, "content": content or form.empty, "tool_calls": calls}  # type: ignore[typeddict-item]

    @cached_property
    def _takes_thoughts_of_calls(self) -> bool:
        """Whether the template tells thoughts from text in the content of a message with tool calls, so that it ends
        them no more often than it begins them."""
        begin, end = self.thought_marks
        message = _calling(f"{begin}\n{MARK}\n{end}\n\n")
        assert self._call_form is not None
        calls = [_call_in_form(call, self._call_form) for call in message["tool_calls"]]
        messages = [self._shape(_message("user", QUESTION)), {**message, "tool_calls": calls}]
        text = self._rendered(messages, False, [PROBE_TOOL]).rpartition(QUESTION)[2]
        return text.count(end) <= text.count(begin)

    def _short_id(self, name: str) -> str:
        """The id of a tool call as the template accepts it."""
        form = self._call_form
        return _short_id(name) if form is not None and form.has_short_ids else name

    @cached_property
    def writes_text_beside_calls(self) -> bool:
        """Whether the template writes the text of an answer that also calls tools."""
        try:
            return MARK in self.turn([_message("user", QUESTION), _calling(MARK)], [PROBE_TOOL]).completion
        except UsageError:
            return False

    @property
    def end_token(self) -> str:
        """The tokenizer's end token, for answers after which the template writes none.

        Raises UsageError if the model has none.
        """
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
        before, _, after = self.text([*asked, _message("assistant", MARK)], False).rpartition(MARK)
        self._refuse_other_beginning(before)
        if _end_of_turn(after, self.end_words) is None:
            if _end_of_turn(self.text(asked, True).rpartition(QUESTION)[2], self.end_words) is not None:
                raise self._refusal("the chat template writes an end token after a question, but none after an answer")
            added = self._end_of_next or self.end_token
            lines.append(f"the chat template writes no end token after an answer: training adds {added!r}")
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

    def _refuse_other_beginning(self, before: str) -> None:
        """Raise UsageError if a finished answer begins otherwise than a prompt lets the model begin it. `before` is the
        text before the answer to QUESTION."""
        prompt = self.text([_message("user", QUESTION)], True)
        begun = self._without_thoughts(prompt)
        if not before.startswith(begun):
            raise self._refusal(
                f"the chat template begins an answer with {before.rpartition(QUESTION)[2]!r}, but a prompt ends with"
                f" {prompt.rpartition(QUESTION)[2]!r}"
            )

    def check_conversation(self, messages: Sequence[Message], tools: Tools | None = None) -> list[str]:
        """Check that the template writes the tools and every message of a conversation that ends with an answer.

        Returns the roles of the messages whose text it changes other than at the ends. Raises UsageError for what it
        leaves out.
        """
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]

        def prompts(messages: Sequence[Message], tools: Tools | None) -> str:
            """The prompts of all answers, one after the other: not every one has every message (Mistral)."""
            return "\n".join(self.text(messages[:place], True, tools=tools) for place in answers)

        prompt, asked = prompts(messages, tools), messages[:-1]
        if tools:
            first: Any = {**tools[0], "function": {**tools[0]["function"], "name": PROBE}}
            if PROBE not in prompts(messages, [first, *tools[1:]]):
                raise self._loss("the tools")
        changed = []
        for place, message in enumerate(asked):
            for call in message.get("tool_calls") or []:
                self._refuse_lost_call(call, prompt)
            if message["role"] == "assistant" or _is_written(message.get("content") or "", prompt):
                continue
            marked: Message = {**message, "content": MARK}
            if MARK not in prompts([*messages[:place], marked, *messages[place + 1 :]], tools):
                raise self._loss(f"a message of the role {message['role']}")
            changed.append(message["role"])
        return changed

    @cached_property
    def stripped_roles(self) -> frozenset[str]:
        """The roles whose messages the template strips of white space at their ends."""
        found, content, user = set(), f" {MARK}\n", _message("user", QUESTION)
        for role in ("system", "user", "assistant", "tool"):
            one = _message(role, content)
            before = [user] if role == "assistant" else []
            if role == "tool":
                if self._call_form is None:
                    continue
                before, one = [user, _calling("")], _result(content)
            try:
                text = self.text([*before, one, *([user] if role == "system" else [])], role != "assistant")
            except RefusedConversationError:
                continue
            if MARK in text and content not in text and json.dumps(content)[1:-1] not in text:
                found.add(role)
        return frozenset(found)

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


def _calling(content: str) -> Message:
    """A message that calls the tool PROBE."""
    call = {"id": PROBE_ID, "type": "function", "function": {"name": PROBE, "arguments": {PROBE: 1}}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def _result(content: str) -> Message:
    """The result of the call in `_calling`."""
    return {"role": "tool", "content": content, "tool_call_id": PROBE_ID, "name": PROBE}


def texts_in(value: Any) -> Iterator[str]:
    """Yield each text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def _is_written(text: str, whole: str) -> bool:
    """Whether a text contains another one, as it is, without white space at its ends, or as JSON writes it."""
    bare = text.strip()
    if bare in whole:
        return True
    escaped = [json.dumps(one, ensure_ascii=ascii)[1:-1] for one in (text, bare) for ascii in (False, True)]
    return any(one in whole or json.dumps(one)[1:-1] in whole for one in escaped)


def _call_in_form(call: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    """A tool call in the form that a template writes."""
    function = call["function"]
    if form.has_text:
        text = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
        function = {**function, "arguments": text}
    found = {**call, "function": function}
    if form.has_short_ids and "id" in call:
        found["id"] = _short_id(call["id"])
    return found


def _short_id(name: str) -> str:
    """An id of ID_LENGTH characters: the id itself if it has as many."""
    return name if len(name) == ID_LENGTH else digest_of(name)[:ID_LENGTH]


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
