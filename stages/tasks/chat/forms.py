"""The forms in which people keep conversations, and the turns of a record in any of them.

    messages      {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools"}
    ShareGPT      {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system"}
    LLaVA         the same with "image"
    Alpaca        {"instruction": "...", "input": "", "output": "...", "history": [["...", "..."]], "system"}
    pairs         {"prompt", "completion"}, {"query", "response"}, {"question", "answer"}; texts, or lists of messages
    preference    {"prompt": "...", "chosen": "...", "rejected": "..."}; only the chosen answer is read
    text          {"text": "..."}, plain text without roles

Sources: OpenAI's chat format, FastChat's ShareGPT, Stanford Alpaca, LLaVA's Finetune_Custom_Data.md, and the data
formats of TRL, LLaMA-Factory and ms-swift. Keys may have any case. A list or an object may be JSON as text, as in a
cell of a CSV file, and a record may be inside `data` of another. Texts are never stripped or changed; a number becomes
text as it is written.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stages.tasks.common.json_lines import BadRecordError, found_keys, is_given, text_or_number
from stages.tasks.common.tables import DECODER

Form = Literal["messages", "sharegpt", "llava", "alpaca", "prompt", "query", "question", "preference", "text"]
TITLES: dict[Form, str] = {
    "messages": "messages",
    "sharegpt": "ShareGPT",
    "llava": "LLaVA",
    "alpaca": "Alpaca",
    "prompt": "prompt and completion",
    "query": "query and response",
    "question": "question and answer",
    "preference": "preference",
    "text": "text",
}
"""Names of the forms for people."""

NO_FORM = "no known form"
"""Why a record is skipped of which nothing is known."""

_TURNS = ("messages", "conversations", "conversation", "dialog")
"""Keys of lists of turns."""
_ASKED: tuple[tuple[str, Form], ...] = (
    *(("instruction", "alpaca"), ("prompt", "prompt"), ("query", "query"), ("question", "question")),
    ("input", "alpaca"),
)
"""Keys of the question in forms with one question and one answer, in the order in which they are looked for."""
_BESIDE = ("input", "context")
"""Keys of a text that belongs to the question and follows it on a new line, as for Alpaca and Dolly."""
_ANSWERS: dict[Form, tuple[str, ...]] = {
    "alpaca": ("output", "response"),
    "prompt": ("completion", "response", "answer", "output"),
    "query": ("response", "answer", "output"),
    "question": ("answer", "response", "output"),
}
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_PICTURES = ("images", "image")
_UNREAD = ("videos", "video", "audios", "audio")
_CALL = "call"
"""Role of turns that hold nothing but calls of tools."""
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("tool_call", "tool_calls", "function_call"), _CALL),
}
_ASKS, _ANSWERED = ("human", "user", "input", "question", "prompt", "query"), ("assistant", "gpt", "output", "answer")
"""Keys of a question and its answer in an entry that is two turns."""

COLUMNS = (
    *("messages", "system", "tools", "images", "role", "content", "instruction", "input", "output", "history"),
    *("prompt", "completion", "query", "response", "question", "answer", "chosen", "text", "id", "group"),
)
"""What a column of the data may be named as."""

WEIGHTED = "weights of messages, which are ignored"
"""A note about a record."""


@dataclass(frozen=True)
class Picture:
    """A picture in a conversation."""

    name: str
    """Path or URI; empty for the next picture of the record's own list."""
    content: bytes | None = None
    """Content of its file, if the record has it."""


NEXT = Picture("")
"""The next picture of the record's own list."""


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation, as the data have it."""

    role: str
    parts: tuple[str | Picture, ...]
    """Texts and pictures."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    more: Mapping[str, str] = field(default_factory=dict)
    """`tool_call_id`, `name` and `reasoning_content`, if there are any."""

    @property
    def is_empty(self) -> bool:
        """Whether the turn has no content: only white space, and neither pictures nor calls."""
        return not self.tool_calls and all(isinstance(part, str) and not part.strip() for part in self.parts)

    @property
    def has_text(self) -> bool:
        """Whether the turn has a text, or a picture."""
        return any(isinstance(part, Picture) or part.strip() for part in self.parts)


@dataclass(frozen=True)
class Conversation:
    """A record's conversation, as the data have it."""

    form: Form
    turns: tuple[Turn, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    pictures: tuple[Picture, ...] = ()
    """The record's own list of pictures."""
    text: str | None = None
    """Plain text, in place of turns."""
    id: str = ""
    """The record's own id; empty without one."""
    group: str = ""
    notes: tuple[str, ...] = ()


# -- the form ----------------------------------------------------------------------------------------------------


def conversation_in(
    record: Any, form: Form | None = None, columns: Mapping[str, str] | None = None, binary: bool = False
) -> Conversation:
    """The conversation in a record.

    `form`: the record's form; None: found by its keys. `columns`: the data's names of columns by the name in COLUMNS.
    `binary`: whether the record comes from a table whose rows all have the same fields, where missing values of tools
    and their arguments are null. Raises BadRecordError if the record is unusable.
    """
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object", f"found {type(record).__name__}")
    columns = columns or {}
    fields = _fields(record, columns)
    found = form or _form_of(fields)
    if found is None or (form and not _has_form(fields, form)):
        inner = _loaded(fields.get("data"), "data", strict=False)
        if isinstance(inner, dict):
            fields = {**fields, "data": None, **_fields(inner, columns)}
            found = form or _form_of(fields)
    if found is None:
        raise BadRecordError(NO_FORM, found_keys(record))
    unread = next((key for key in _UNREAD if is_given(fields.get(key))), None)
    if unread is not None:
        raise BadRecordError("video or audio, which chat does not read", f"key {unread}")
    own, group = (text_or_number(fields.get(key)) or "" for key in ("id", "group"))
    base = Conversation(found, id=own.strip(), group=group.strip())
    if found == "text":
        return replace(base, text=_text(fields.get("text"), "text"))
    return replace(
        base,
        turns=tuple(_turns_in(fields, found, columns, binary)),
        tools=tuple(_tools_in(fields, binary)),
        pictures=tuple(_pictures_in(fields)),
        notes=(WEIGHTED,) if _has_weights(fields) else (),
    )


def _fields(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record's values by lower-case key, or by the name that `columns` gives the key."""
    lower = {key.strip().lower(): value for key, value in reversed(record.items()) if isinstance(key, str)}
    found = lower | {key: value for key, value in record.items() if key in lower}
    named = {}
    for name, column in columns.items():
        if column in record:
            named[name] = record[column]
            found.pop(column.strip().lower(), None)
        elif column.lower() in found:
            named[name] = found.pop(column.lower())
    return found | named


def _form_of(fields: Mapping[str, Any]) -> Form | None:
    """The form of a record by its keys; None if it has none of them."""
    key = _turns_key(fields)
    if key is not None:
        turns = _loaded(fields[key], key, strict=False)
        froms = isinstance(turns, list) and any(isinstance(one, dict) and "from" in _lower(one) for one in turns)
        return "messages" if not froms else "llava" if _first(fields, _PICTURES) is not None else "sharegpt"
    for is_there in (is_given, lambda value: value is not None):
        for asked, form in _ASKED:
            if is_there(fields.get(asked)) and any(name in fields for name in _ANSWERS[form]):
                return form
        if is_given(fields.get("chosen")):
            return "preference"
        if is_there(fields.get("text")):
            return "text"
    return next((form for asked, form in _ASKED if is_given(fields.get(asked))), None)


def _has_form(fields: Mapping[str, Any], form: Form) -> bool:
    """Whether a record has keys of a form."""
    asked = tuple(key for key, of in _ASKED if of == form)
    keys = {"preference": ("chosen",), "text": ("text",)}.get(form, asked or _TURNS)
    return any(key in fields for key in keys)


def _turns_key(fields: Mapping[str, Any]) -> str | None:
    """The key of the record's list of turns; None without one."""
    given = next((key for key in _TURNS if is_given(fields.get(key))), None)
    return given or next((key for key in _TURNS if fields.get(key) == []), None)


def _first(fields: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The first given value of these keys; None if none is given."""
    return next((fields[key] for key in keys if is_given(fields.get(key))), None)


def _lower(turn: Mapping[Any, Any]) -> dict[str, Any]:
    """The values of an object by lower-case key."""
    return {str(key).lower(): value for key, value in turn.items()}


# -- turns -------------------------------------------------------------------------------------------------------


def _turns_in(fields: dict[str, Any], form: Form, columns: Mapping[str, str], binary: bool) -> Iterator[Turn]:
    """The turns of a record, in order."""
    turns: list[Turn] = []
    if form in ("messages", "sharegpt", "llava"):
        key = _turns_key(fields)
        if key is None:
            raise BadRecordError("no messages", found_keys(fields))
        turns += _listed_turns(fields[key], key, columns, binary)
        chosen = fields.get("chosen")  # LLaMA-Factory's preference data: the conversation ends with a question
        if isinstance(chosen, dict) and turns and turns[-1].role != "assistant":
            turns += _listed_turns([chosen], "chosen", columns, binary)
    else:
        turns += _history(fields, columns, binary)
        turns += _pair(fields, form, columns, binary)
    system = _first(fields, _SYSTEM)
    if system is not None:
        text = _text(system, "system")
        if turns and turns[0].role == "system" and turns[0].parts != (text,):
            raise BadRecordError("two system prompts", text[:100])
        if not turns or turns[0].role != "system":
            yield Turn("system", (text,))
    yield from turns


def _pair(fields: dict[str, Any], form: Form, columns: Mapping[str, str], binary: bool) -> Iterator[Turn]:
    """The turns of a record with one question and one answer. Either may be a list of messages."""
    if form == "preference":
        question, answer = _first(fields, ("prompt", "question", "instruction", "query", "input")), fields.get("chosen")
        chosen = _loaded(answer, "chosen", strict=False)
        whole = isinstance(chosen, list) and chosen and isinstance(chosen[0], dict)
        if not (whole and _role_of(chosen[0], columns) in ("user", "system")):
            if question is None:
                raise BadRecordError("no prompt for the chosen answer", found_keys(fields))
            yield from _said(question, "user", "prompt", columns, binary)
    else:
        answer = _first(fields, _ANSWERS[form])
        keys = [*(key for key, of in _ASKED if of == form), *_BESIDE]
        asked = [key for key in dict.fromkeys(keys) if is_given(fields.get(key))]
        if len(asked) > 1:
            yield Turn("user", ("\n".join(_text(fields[key], key) for key in asked),))
        elif asked:
            yield from _said(fields[asked[0]], "user", asked[0], columns, binary)
    if is_given(answer):
        yield from _said(answer, "assistant", "the answer", columns, binary)


def _said(value: Any, role: str, what: str, columns: Mapping[str, str], binary: bool) -> Iterator[Turn]:
    """The turns of a question or an answer: a text of that role, or messages."""
    found = [value] if isinstance(value, dict) else _loaded(value, what, strict=False)
    if isinstance(found, list) and (found is value or all(isinstance(one, dict) and "role" in one for one in found)):
        yield from _listed_turns(found, what, columns, binary)
    else:
        yield Turn(role, (_text(value, what),))


def _history(fields: dict[str, Any], columns: Mapping[str, str], binary: bool) -> Iterator[Turn]:
    """The turns in `history`: pairs of question and answer, or messages."""
    pairs = _loaded(fields.get("history"), "history")
    if not is_given(pairs):
        return
    if not isinstance(pairs, list):
        raise BadRecordError("history is not a list of pairs", repr(pairs)[:100])
    for pair in pairs:
        if isinstance(pair, list) and len(pair) == 2:
            yield Turn("user", (_text(pair[0], "history"),))
            yield Turn("assistant", (_text(pair[1], "history"),))
        elif isinstance(pair, dict):
            yield from _listed_turns([pair], "history", columns, binary)
        else:
            raise BadRecordError("history is not a list of pairs", repr(pair)[:100])


def _listed_turns(value: Any, what: str, columns: Mapping[str, str], binary: bool) -> Iterator[Turn]:
    """The turns of a list of messages, or of entries that are question and answer."""
    entries = _loaded(value, what)
    if isinstance(entries, dict) and entries and all(isinstance(one, list) for one in entries.values()):
        # `datasets` stores a sequence of objects as an object of sequences
        entries = [dict(zip(entries, one, strict=False)) for one in zip(*entries.values(), strict=False)]
    if not isinstance(entries, list):
        raise BadRecordError(f"{what} is not a list", repr(entries)[:100])
    for entry in entries:
        turn = _loaded(entry, "a turn", strict=False)
        if not isinstance(turn, dict):
            raise BadRecordError("a turn is not an object", repr(turn)[:100])
        values = _fields(turn, {name: columns[name] for name in ("role", "content") if name in columns})
        asked, answered = (next((key for key in keys if key in values), None) for keys in (_ASKS, _ANSWERED))
        if asked and answered and not {"role", "from"} & values.keys():
            yield Turn("user", (_text(values[asked], asked),))
            yield Turn("assistant", (_text(values[answered], answered),))
        else:
            yield _turn(values, binary)


def _role_of(turn: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The role of a turn; None if it is unknown."""
    values = _fields(dict(turn), {name: columns[name] for name in ("role",) if name in columns})
    role = next((values[key] for key in ("role", "from") if values.get(key) is not None), None)
    return _ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def _turn(values: dict[str, Any], binary: bool) -> Turn:
    """A turn with a role. Raises BadRecordError for an unknown role and for content of another type."""
    role = _role_of(values, {})
    if role is None:
        raise BadRecordError("a turn without a known role", repr(values)[:100])
    content = next((values[key] for key in ("content", "value", "text") if values.get(key) is not None), None)
    if role == _CALL:
        return Turn("assistant", (), tuple(_tool_calls(content, binary)))
    calls: tuple[dict[str, Any], ...] = ()
    if role == "assistant":
        given = _first(values, ("tool_calls", "function_call"))
        calls = tuple(_tool_calls(given, binary)) if given is not None else ()
    more = {}
    for key in ("tool_call_id", "name"):
        if is_given(values.get(key)):
            more[key] = _text(values[key], key)
    thought = _first(values, ("reasoning_content", "reasoning", "thinking"))
    if role == "assistant" and thought is not None:
        more["reasoning_content"] = _text(thought, "reasoning_content")
    return Turn(role, tuple(_parts(content)), calls, more)


def _parts(content: Any) -> Iterator[str | Picture]:
    """The texts and pictures of a message's content; nothing for null."""
    if content is None:
        return
    if not isinstance(content, list):
        yield _text(content, "content")
        return
    for entry in content:
        part = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, dict) else entry
        if isinstance(part, str):
            yield part
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind in ("image", "image_url", "input_image"):
            named = next((part[key] for key in ("image_url", "image", "url", "path") if key in part), None)
            yield NEXT if named is None else _picture(named)
        else:
            raise BadRecordError("a part of a message that is neither text nor picture", repr(part)[:100])


# -- tools -------------------------------------------------------------------------------------------------------


def _tools_in(fields: dict[str, Any], binary: bool) -> list[dict[str, Any]]:
    """The record's tools in OpenAI's form. A function without the form around it gets it."""
    value = _loaded(_first(fields, _TOOLS), "tools")
    if not is_given(value):
        return []
    found = []
    for entry in value if isinstance(value, list) else [value]:
        tool = _loaded(entry, "tools")
        if not isinstance(tool, dict) or not isinstance((tool.get("function") or tool), dict):
            raise BadRecordError("tools is not a list of objects", repr(entry)[:100])
        tool = _without_nulls(tool) if binary else tool
        if not isinstance((tool.get("function") or tool).get("name"), str):
            raise BadRecordError("a tool without a name", repr(entry)[:100])
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return _writable(found, "tools")


def _tool_calls(value: Any, binary: bool) -> list[dict[str, Any]]:
    """Calls of tools in OpenAI's form, with arguments as objects. `value` is a call or a list of them, or JSON."""
    calls = _loaded(value, "a tool call", strict=True)
    found = []
    for entry in calls if isinstance(calls, list) else [calls]:
        call = _loaded(entry, "a tool call")
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecordError("a tool call without a name", repr(entry)[:100])
        given = function.get("arguments")
        arguments = {} if given is None or given == "" else _loaded(given, "arguments of a tool call")
        if not isinstance(arguments, dict):
            raise BadRecordError("arguments of a tool call are not an object", repr(given)[:100])
        if binary and not isinstance(given, str):
            arguments = _without_nulls(arguments)
        name = {"id": call["id"]} if is_given(call.get("id")) else {}
        found.append({**name, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return _writable(found, "a tool call")


def _without_nulls(value: Any) -> Any:
    """A value without the keys whose value is null, at any depth: a table has every key in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _writable(value: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The value itself. Raises BadRecordError if it cannot be written as JSON in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRecordError(f"{what} cannot be written as JSON", _ascii(str(error))) from error
    return value


# -- values ------------------------------------------------------------------------------------------------------


def _pictures_in(fields: dict[str, Any]) -> list[Picture]:
    """The record's own list of pictures; empty without one."""
    value = _loaded(_first(fields, _PICTURES), "images", strict=False)
    if not is_given(value):
        return []
    return [_picture(one) for one in (value if isinstance(value, list) else [value]) if is_given(one)]


def _picture(value: Any) -> Picture:
    """A picture: a path or URI, an object with `url`, `path` or `bytes`. Raises BadRecordError for anything else."""
    if isinstance(value, bytes):
        return Picture("picture", value)
    if isinstance(value, dict):
        content, name = value.get("bytes"), _first(value, ("url", "path"))
        if isinstance(content, bytes):
            return Picture(name if isinstance(name, str) else "picture", content)
        value = name
    if not isinstance(value, str) or not value.strip():
        raise BadRecordError("a picture without a path", repr(value)[:100])
    return Picture(value)


def _has_weights(fields: dict[str, Any]) -> bool:
    """Whether a message states whether it is learnt, as OpenAI's `weight` and ms-swift's `loss` do."""
    turns: list[Any] = next((fields[key] for key in _TURNS if isinstance(fields.get(key), list)), [])
    given = (one.get(key) for one in turns if isinstance(one, dict) for key in ("weight", "loss"))
    return any(value == 0 for value in given)


def _loaded(value: Any, what: str, strict: bool = True) -> Any:
    """The value of JSON as text; any other value unchanged. Text that is not JSON is unchanged without `strict`, else
    raises BadRecordError."""
    if not isinstance(value, str) or (not strict and value.lstrip()[:1] not in ("[", "{")):
        return value
    if not value.strip():
        return None
    try:
        found = DECODER.decode(value.strip())
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        if not strict:
            return value
        raise BadRecordError(f"{what} is not JSON", _ascii(f"{error}, found {value[:60]!r}")) from error
    return found


def _text(value: Any, what: str) -> str:
    """A text unchanged, a number as it is written. Raises BadRecordError for anything else."""
    found = text_or_number(value)
    if found is None:
        raise BadRecordError(f"{what} is not a text", repr(value)[:100])
    return found


def _ascii(text: str) -> str:
    """The text in ASCII, at most 200 characters."""
    return text.encode("ascii", "backslashreplace").decode()[:200]
