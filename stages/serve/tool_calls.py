"""Reads tool calls in what a model writes, by transformers' response parser.

The parser needs a response template: the tokenizer's own, if the model's folder has one
(https://huggingface.co/docs/transformers/chat_response_parsing), or one that follows from what the chat template writes
for a call, where that is JSON between two marks, as with Qwen and Hermes.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from stages.contract.errors import UsageError
from stages.models.chat_template import PROBE, PROBE_TOOL
from stages.models.rendering import Renderer

QUESTION: Any = {"role": "user", "content": PROBE}
CALL = {"name": PROBE, "arguments": {PROBE: 1}}
"""A call of PROBE_TOOL, to find how the template writes it."""


class ToolCalls:
    """How a model calls tools."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    @cached_property
    def problem(self) -> str | None:
        """Why this model's tool calls cannot be read; None if they can.

        They can if a call that the chat template writes is read back from its tokens, decoded as the engine does.
        """
        tokenizer = self._renderer.tokenizer
        if not hasattr(tokenizer, "get_response_parser"):  # transformers 5.5
            return "this version of transformers has no parser for them"
        try:
            written = self._written_call()
        except UsageError as error:
            return f"{error}"
        if self._template is None:
            return (
                "its chat template does not write calls as JSON between marks, and its folder has no response_template"
            )
        tokens = tokenizer.encode(written, add_special_tokens=False)
        reading = self.begin([], [PROBE_TOOL])
        reading.read(str(tokenizer.decode(tokens, skip_special_tokens=True)))
        reading.end()
        if [json.loads(call["function"]["arguments"]) for call in reading.calls] != [CALL["arguments"]]:
            return "a call that its chat template writes is not read back from what the engine decodes"
        return None

    def begin(self, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]]) -> "Reading":
        """Begin to read an answer to a prompt of these tokens."""
        tokenizer = self._renderer.tokenizer
        begun = str(tokenizer.decode(list(prompt))) if self._own_template is not None else ""
        return Reading(tokenizer.get_response_parser(self._template, prefix=begun, tools=list(tools)))

    @property
    def _own_template(self) -> dict[str, Any] | None:
        """The tokenizer's own response template."""
        return getattr(self._renderer.tokenizer, "response_template", None)

    @cached_property
    def _template(self) -> dict[str, Any] | None:
        """The response template; None if there is none. Raises UsageError if the chat template writes no calls."""
        if self._own_template is not None:
            return self._own_template
        written = self._written_call()
        ends = [place for word in self._renderer.template.end_words if (place := written.find(word)) >= 0]
        written = written[: min(ends, default=len(written))]
        places = (found.start() for found in re.finditer(r"\{", written))
        place, call, end = next((found for place in places if (found := _json_at(written, place))), (0, {}, 0))
        keys = {key: next((own for own, found in call.items() if found == value), None) for key, value in CALL.items()}
        opened, closed = written[:place].strip(), written[end:].strip()
        if None in keys.values() or not opened or not closed:
            return None
        return {
            "start_anchor": opened,  # the parser wants one, for a prompt, of which it gets none
            "fields": {
                "tool_calls": {
                    "open_pattern": rf"\s*{re.escape(opened)}",
                    "close": closed,
                    "repeats": True,
                    "content": "json",
                    "transform": {
                        "type": "function",
                        "function": {key: f"{{content.{own}}}" for key, own in keys.items()},
                    },
                },
                "content": {"content": "text"},
            },
        }

    def _written_call(self) -> str:
        """What the model has to write for the call CALL. Raises UsageError if the chat template writes no calls."""
        entry = {"id": "lorry0001", "type": "function", "function": CALL}
        answer: Any = {"role": "assistant", "content": "", "tool_calls": [entry]}
        return self._renderer.template.turn([QUESTION, answer], [PROBE_TOOL]).completion


def _json_at(text: str, place: int) -> tuple[int, dict[str, Any], int] | None:
    """The place, the JSON object that a text has there, and the place after it; None if it has none."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, place)
    except ValueError:
        return None
    return place, value, end


class Reading:
    """Reads one answer while it grows."""

    def __init__(self, parser: Any) -> None:
        self.content = ""
        """The text beside calls and thoughts, so far."""
        self.thoughts = ""
        """Thoughts, if the tokenizer's own response template tells them apart."""
        self.calls: list[dict[str, Any]] = []
        """The calls in OpenAI's form, after `end`."""
        self._parser, self._text, self._is_text = parser, "", False

    def read(self, text: str) -> str:
        """Read the answer so far, which begins with what was read before. Returns what is new of its content.

        From a call on that is not as the model's template has it, such as broken JSON, all is content.
        """
        before, new, self._text = len(self.content), text[len(self._text) :], text
        if self._is_text:
            self.content += new
            return new
        try:
            self._take(self._parser.feed(new))
        except (ValueError, KeyError, TypeError):
            self._is_text = True
            self._take_all()
        return self.content[before:]

    def end(self) -> str:
        """End the reading. Returns what is new of the content: all of an answer whose calls cannot be read."""
        before = len(self.content)
        if not self._is_text:
            try:
                message, events = self._parser.finalize()
                self._take(events)
                self.calls = [_openai_call(call) for call in message.get("tool_calls") or ()]
            except (ValueError, KeyError, TypeError):
                self._take_all()
        return self.content[before:]

    def _take_all(self) -> None:
        """Have all of the text as content. After a call that was read, what was sent is no beginning of the text: then
        the text follows it whole."""
        sent = self.content
        self.content = self._text if self._text.startswith(sent) else f"{sent}\n{self._text}"

    def _take(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Add the texts in the parser's events."""
        for event in events:
            if event["type"] == "region_chunk" and event["field"] == "content":
                self.content += event["text"]
            elif event["type"] == "region_chunk" and event["field"] == "thinking":
                self.thoughts += event["text"]


def _openai_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as OpenAI's interface has it, with an id of its own. Raises KeyError or TypeError for anything else."""
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": str(function["name"]), "arguments": text},
    }
