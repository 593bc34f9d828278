"""The chat template of a run as other servers need it, which render it with transformers and know nothing of Lorry.

Lorry's renderer does some things around a template: it writes the tokenizer's first token, the run's date and the
system message of a template that has no system role. For a server, the template has to do these itself. A preamble in
Jinja does, and `refuse_other_prompts` compares what comes of it with the renderer's own tokens.
"""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from stages.contract.errors import UsageError
from stages.contract.records import unescape_places
from stages.models.chat_settings import ChatSettings
from stages.models.chat_template import QUESTION, ChatTemplate
from stages.models.rendering import Renderer
from stages.models.saved_template import saved_template

COMPARED = 20
"""Number of samples whose prompts are compared."""

_FOLD = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set lorry = namespace(messages=[], system=messages[0]['content']) -%}"
    "{%- for message in messages[1:] -%}"
    "{%- if message['role'] == 'user' and lorry.system -%}"
    "{%- set message = dict(message, content=lorry.system ~ '\\n\\n' ~ message['content']) -%}"
    "{%- set lorry.system = '' -%}"
    "{%- endif -%}"
    "{%- set lorry.messages = lorry.messages + [message] -%}"
    "{%- endfor -%}"
    "{%- set messages = lorry.messages -%}"
    "{%- endif -%}"
)
"""Writes the system message into the first user's message, as `ChatTemplate.folded` does."""


def served_template(renderer: Renderer, model: Path, settings: ChatSettings) -> str:
    """The chat template of a run, as Jinja text that renders alone what `renderer` does. `model` is the base's folder.

    `model.enable_thinking` is a default in it, which a request can change.
    """
    template = renderer.template
    preamble = ""
    if settings.date is not None:
        preamble += _date_macro(template, datetime.fromisoformat(settings.date))
    if not template.has_system_role:
        preamble += _FOLD
    if not settings.named:  # else `saved_template` writes it
        preamble += _first_text(renderer)
    return preamble + (saved_template(model, settings) or template.source)


def _date_macro(template: ChatTemplate, day: datetime) -> str:
    """A macro in the place of `strftime_now`, with one date for each form of it in the template."""
    forms = re.findall(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", template.source)
    dates = json.dumps({form: day.strftime(form) for _, form in forms}, ensure_ascii=False)
    return f"{{%- macro strftime_now(form) -%}}{{{{- ({dates})[form] -}}}}{{%- endmacro -%}}"


def _first_text(renderer: Renderer) -> str:
    """A Jinja expression for the tokenizer's first token, where Lorry writes it and not the template; else empty."""
    bos = renderer.tokenizer.bos_token
    probe = renderer.template.text([{"role": "user", "content": QUESTION}], True)
    tokens = renderer.render("probe", [{"role": "user", "content": QUESTION}]).tokens
    written = bos is not None and tokens[:1] == [renderer.tokenizer.bos_token_id] and not probe.startswith(bos)
    return "{{- bos_token }}" if written else ""


def refuse_other_prompts(renderer: Renderer, template: str, samples: Iterable[Mapping[str, Any]]) -> int:
    """Compare the tokens of `template`, rendered as a server does, with those of the renderer. Returns how many of the
    samples were compared: the first COMPARED without pictures, without thoughts and tool calls, which Lorry gives each
    template in its own form, and without control words, which servers do not hide.

    Raises UsageError for the first prompt that differs.
    """
    compared = 0
    for sample in samples:
        messages = sample["messages"]
        plain = all(message.keys() <= {"role", "content"} for message in messages)
        if sample["images"] or not messages or not plain or renderer.control_words_in(sample):
            continue
        tools = {"tools": sample["tools"]} if sample.get("tools") else {}
        ours = renderer.render(sample["id"], messages, **tools).tokens
        sent = [{**message, "content": unescape_places(message.get("content") or "")} for message in messages]
        theirs = renderer.tokenizer.apply_chat_template(
            sent, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False, **tools
        )
        if ours != theirs:
            place = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
            here, there = (renderer.tokenizer.decode(tokens[place : place + 8]) for tokens in (ours, theirs))
            raise UsageError(
                f"sample {sample['id']}: training renders {here!r} at token {place}, vLLM would render {there!r}; use"
                " --engine transformers, whose server renders as training does"
            )
        compared += 1
        if compared == COMPARED:
            break
    return compared
