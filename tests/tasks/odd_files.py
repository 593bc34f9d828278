"""Makes files of conversations as people have them, whole and damaged, with what has to be read out of each.

What is expected is what the file was made from, never what a reader returned.
"""

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import feather

Said = list[tuple[str, str]]
"""A conversation as (role, content)."""


@dataclass(frozen=True)
class OddFile:
    """A file, and what has to be read out of it."""

    name: str
    content: bytes
    expected: list[Any]
    """Conversations as lists of (role, content), plain texts as texts, in order."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Where and why a record is skipped: `:7` or ` row 7`, and the beginning of the reason."""


SAID: dict[str, Said] = {
    "short": [("user", "Hi"), ("assistant", "Hello.")],
    "code": [
        ("user", "Sort it:\n\n```python\nfor x in a:\n    print(x)\n\n\n```  "),
        ("assistant", "```python\r\n\tprint(sorted(a))\r\n```\n"),
        ("user", "  And backwards?\t"),
        ("assistant", 'print(sorted(a, reverse=True))  # "quoted", \\n, {braces}, <b>tags</b>, 100%'),
    ],
    "chinese": [("user", "你好，\n请问“上海”在哪里？"), ("assistant", "上海在中国东部；面积约为6340平方公里。\n")],
    "signs": [
        ("user", "<image> <|im_start|>system\u2028\x0b\x0c\x1f ½ \U0001f600 e\u0301 \u200b<\u2060image>"),
        ("assistant", "\u00a0<image><think>x</think>\u3000"),
    ],
    "long": [part for n in range(20) for part in (("user", f"question {n}\n{'x' * n}"), ("assistant", f"{n}" * 50))],
}
SYSTEM = "You are brief.\n\n  Rules:\n- one\n- two  \n"


# -- forms -------------------------------------------------------------------------------------------------------


def as_messages(said: Said, system: str = "") -> dict[str, Any]:
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": [*first, *({"role": role, "content": text} for role, text in said)]}


def as_parts(said: Said, system: str = "") -> dict[str, Any]:
    found = as_messages(said, system)["messages"]
    return {"messages": [{"role": one["role"], "content": [{"type": "text", "text": one["content"]}]} for one in found]}


def as_sharegpt(said: Said, system: str = "") -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    first = {"system": system} if system else {}
    return {"conversations": [{"from": names[role], "value": text} for role, text in said], **first}


def as_sharegpt_turn(said: Said, system: str = "") -> dict[str, Any]:
    found = as_sharegpt(said)
    first = [{"from": "system", "value": system}] if system else []
    return {"id": "x", "Conversations": [*first, *found["conversations"]]}


def _pairs(said: Said) -> tuple[list[list[str]], str, str]:
    texts = [text for _, text in said]
    pairs = [texts[place : place + 2] for place in range(0, len(texts), 2)]
    return pairs[:-1], *pairs[-1]  # type: ignore[return-value]


def _as_pair(asked: str, answered: str) -> Callable[..., dict[str, Any]]:
    def write(said: Said, system: str = "") -> dict[str, Any]:
        history, question, answer = _pairs(said)
        more: dict[str, Any] = {"history": history} if history else {}
        return {asked: question, answered: answer, **more, **({"system": system} if system else {})}

    return write


def as_conversational_prompt(said: Said, system: str = "") -> dict[str, Any]:
    messages = as_messages(said, system)["messages"]
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def as_preference(said: Said, system: str = "") -> dict[str, Any]:
    messages = as_messages(said, system)["messages"]
    return {
        "prompt": messages[:-1],
        "chosen": messages[-1:],
        "rejected": [{"role": "assistant", "content": "No idea."}],
    }


def as_chosen(said: Said, system: str = "") -> dict[str, Any]:
    messages = as_messages(said, system)["messages"]
    return {"chosen": messages, "rejected": [*messages[:-1], {"role": "assistant", "content": "No idea."}]}


def as_nested(said: Said, system: str = "") -> dict[str, Any]:
    return {"id": 7, "data": as_messages(said, system)}


def as_text_of_json(said: Said, system: str = "") -> dict[str, Any]:
    return {"MESSAGES": json.dumps(as_messages(said, system)["messages"], ensure_ascii=False)}


FORMS: dict[str, Callable[..., dict[str, Any]]] = {
    "messages": as_messages,
    "parts": as_parts,
    "sharegpt": as_sharegpt,
    "sharegpt with a system turn": as_sharegpt_turn,
    "alpaca": _as_pair("instruction", "output"),
    "prompt and completion": _as_pair("prompt", "completion"),
    "prompt of messages": as_conversational_prompt,
    "query and response": _as_pair("query", "response"),
    "question and answer": _as_pair("question", "answer"),
    "preference": as_preference,
    "chosen alone": as_chosen,
    "nested": as_nested,
    "text of JSON": as_text_of_json,
}
CELLS = ("alpaca", "prompt and completion", "query and response", "question and answer", "text of JSON")
"""Forms that a table of texts can hold."""


def expected(said: Said, system: str = "") -> Said:
    """What has to be read."""
    return ([("system", system)] if system else []) + said


# -- files -------------------------------------------------------------------------------------------------------


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def cells(records: list[dict[str, Any]], separator: str = ",", end: str = "\n") -> str:
    columns = list(dict.fromkeys(key for record in records for key in record))
    found = io.StringIO(newline="")
    # Python's writer leaves a lone carriage return outside of quotation marks, unless it quotes all cells
    returns = any("\r" in cell for record in records for cell in record.values() if isinstance(cell, str))
    quoting = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    writer = csv.writer(found, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerow(columns)
    for record in records:
        values = [record.get(column, "") for column in columns]
        writer.writerow([one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in values])
    return found.getvalue()


def table_of(records: list[dict[str, Any]]) -> pa.Table:
    columns = dict.fromkeys(key for record in records for key in record)
    return pa.Table.from_pylist([{**columns, **record} for record in records])


def parquet(records: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table_of(records), sink)
    return sink.getvalue()


def arrow(records: list[dict[str, Any]], stream: bool = False) -> bytes:
    table, sink = table_of(records), io.BytesIO()
    if stream:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        feather.write_feather(table, sink, compression="uncompressed")
    return sink.getvalue()


WRITERS: dict[str, tuple[str, Callable[[list[Any]], bytes]]] = {
    "lines": ("jsonl", lambda records: lines(records).encode()),
    "array": ("json", lambda records: json.dumps(records, indent=2).encode()),
    "parquet": ("parquet", parquet),
    "arrow": ("arrow", arrow),
}
CELL_WRITERS: dict[str, tuple[str, Callable[[list[Any]], bytes]]] = {
    "commas": ("csv", lambda records: cells(records).encode()),
    "semicolons": ("csv", lambda records: cells(records, ";", "\r\n").encode()),
    "tabs": ("tsv", lambda records: cells(records, "\t").encode()),
}


def whole_files() -> Iterator[OddFile]:
    """Files without a fault: each form in each kind of file and encoding."""
    for form, write in FORMS.items():
        records = [write(said, system) for said in SAID.values() for system in ("", SYSTEM)]
        wanted = [expected(said, system) for said in SAID.values() for system in ("", SYSTEM)]
        for kind, (ending, encode) in WRITERS.items():
            yield OddFile(f"{form}, {kind}.{ending}", encode(records), wanted)
        yield OddFile(f"{form}, a record.json", json.dumps(records[3]).encode(), wanted[3:4])
        for kind, (ending, encode) in CELL_WRITERS.items() if form in CELLS else ():
            yield OddFile(f"{form}, {kind}.{ending}", encode(records), wanted)
    plain = [text for said in SAID.values() for _, text in said]
    for kind, (ending, encode) in {**WRITERS, **CELL_WRITERS}.items():
        yield OddFile(f"text, {kind}.{ending}", encode([{"text": text} for text in plain]), plain)
    records = [as_sharegpt(SAID["chinese"]), as_messages(SAID["chinese"], "请简短回答。")]
    wanted = [expected(SAID["chinese"]), expected(SAID["chinese"], "请简短回答。")]
    for encoding in ("gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"):
        yield OddFile(f"{encoding}.jsonl", lines(records).encode(encoding), wanted)
        yield OddFile(f"{encoding}.json", json.dumps(records, ensure_ascii=False).encode(encoding), wanted)
    pairs = [_as_pair("question", "answer")(SAID["chinese"])]
    for encoding in ("gbk", "utf-16", "utf-8-sig"):
        yield OddFile(f"{encoding}.csv", cells(pairs, end="\r\n").encode(encoding), [expected(SAID["chinese"])])
    every = [write(SAID["code"]) for write in FORMS.values()]
    yield OddFile("all forms.jsonl", lines(every).encode(), [expected(SAID["code"])] * len(every))
    yield OddFile("all forms.json", json.dumps(every).encode(), [expected(SAID["code"])] * len(every))
    long = "长" * (10 * 2**20)  # 30 MB
    yield OddFile("30 MB lines.jsonl", lines([as_messages([("user", long), ("assistant", "ok")])]).encode(), [
        [("user", long), ("assistant", "ok")],
    ])  # fmt: skip
    yield OddFile("a cell of 30 MB.csv", cells([{"question": long, "answer": "ok"}]).encode(), [
        [("user", long), ("assistant", "ok")],
    ])  # fmt: skip


# -- odd records -------------------------------------------------------------------------------------------------

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
QA = [("user", "q"), ("assistant", "a")]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def _of(*messages: Any, **more: Any) -> str:
    return json.dumps({"messages": list(messages), **more})


def _calling(call: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [call]}


def _deep(depth: int) -> str:
    return "[" * depth + "]" * depth


ODD: dict[str, tuple[str, Any]] = {
    # read, perhaps with a change that is counted
    "two questions in a row": (_of(U, U, A), [("user", "q\n\nq"), ("assistant", "a")]),
    "two answers in a row": (_of(U, A, A), [("user", "q"), ("assistant", "a\n\na")]),
    "no answer at the end": (_of(U, A, U), QA),
    "an empty answer at the end": (_of(U, A, U, {"role": "assistant", "content": ""}), QA),
    "the assistant begins": (_of(A, U, A), QA),
    "two system prompts": (_of({"role": "system", "content": "s"}, {"role": "system", "content": "t"}, U, A), [
        ("system", "s\n\nt"), *QA,
    ]),
    "an empty system prompt": (_of({"role": "system", "content": ""}, U, A), [("system", ""), *QA]),
    "developer": (_of({"role": "developer", "content": "s"}, U, A), [("system", "s"), *QA]),
    "roles in capitals": (_of({"role": "USER", "content": "q"}, {"Role": "Assistant", "Content": "a"}), QA),
    "numbers as contents": ('{"question": 3.50, "answer": 1e3}', [("user", "3.50"), ("assistant", "1e3")]),
    "an answer that is true": ('{"question": "q", "answer": true}', [("user", "q"), ("assistant", "true")]),
    "unknown keys": (_of(U, A, score=0.3, nothing=None, deep={"a": [1]}), QA),
    "the same key in another case": ('{"messages": null, "Messages": [], "question": "q", "answer": "a"}', QA),
    "text beside a form": ('{"text": "q a", "instruction": "q", "input": "", "output": "a"}', QA),
    "instruction and input": ('{"instruction": "q", "input": "i", "output": "a"}', [("user", "q\ni"), QA[1]]),
    "input alone": ('{"instruction": null, "input": "q", "output": "a"}', QA),
    "a context beside the instruction": ('{"instruction": "q", "context": "c", "response": "a"}', [
        ("user", "q\nc"), QA[1],
    ]),
    "a context beside the question": ('{"context": "c", "question": "q", "response": "a"}', [("user", "q\nc"), QA[1]]),
    "NaN beside the form": ('{"question": "q", "answer": "a", "id": NaN}', QA),
    "entries of two turns": ('{"conversation": [{"human": "q", "assistant": "a"}]}', QA),
    "one object of lists": ('{"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}', QA),
    "a preference of LLaMA-Factory": (
        '{"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}}', QA),
    "turns as JSON text": (json.dumps({"messages": [json.dumps(U), {"role": "bot", "text": "a"}]}), QA),
    "data inside data as text": ('{"data": "{\\"question\\": \\"q\\", \\"answer\\": \\"a\\"}"}', QA),
    "a text that looks like JSON": ('{"question": "[1, 2]", "answer": "{\\"a\\": 1}"}', [
        ("user", "[1, 2]"), ("assistant", '{"a": 1}'),
    ]),
    "a tool's empty response": (_of(U, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                                    {"role": "tool", "content": ""}, A), [
        ("user", "q"), ("assistant", ""), ("tool", ""), ("assistant", "a"),
    ]),
    # skipped
    "nothing": ("{}", "no known form"),
    "a list": ("[1]", "not a JSON object"),
    "a number": ("7", "not a JSON object"),
    "null": ("null", "not a JSON object"),
    "cut off": ('{"messages": [{"role": "user"', "not JSON"),
    "NaN as an answer": ('{"question": "q", "answer": NaN}', "no answer"),
    "Infinity": ('{"question": "q", "answer": Infinity}', "not JSON"),
    "a key that comes twice": ('{"question": "q", "answer": "a", "answer": "b"}', "not JSON"),
    "a key of a turn that comes twice": (
        '{"messages": [{"role": "user", "content": "q", "content": "p"}, {"role": "assistant", "content": "a"}]}',
        "not JSON"),
    "a lone surrogate": ('{"question": "q\\ud800", "answer": "a"}', "not UTF-8"),
    "deep nesting": (f'{{"question": "q", "answer": "a", "x": {_deep(100_000)}}}', "not JSON"),
    "deep nesting in a tool": (_of(U, A, tools=_deep(100_000)), "tools is not JSON"),
    "an empty list": ('{"messages": []}', "no question"),
    "messages as a number": ('{"messages": 3}', "messages is not a list"),
    "messages as broken JSON": ('{"messages": "[{"}', "messages is not JSON"),
    "a turn as a number": (_of(U, 3), "a turn is not an object"),
    "a turn as null": (_of(U, None, A), "a turn is not an object"),
    "an unknown role": (_of(U, {"role": "narrator", "content": "x"}, A), "a turn without a known role"),
    "a role as a number": (_of({"role": 1, "content": "q"}, A), "a turn without a known role"),
    "no role": (_of({"content": "q"}, A), "a turn without a known role"),
    "content as an object": (_of({"role": "user", "content": {"a": 1}}, A), "content is not a text"),
    "a part of another kind": (_of({"role": "user", "content": [{"type": "input_audio"}]}, A), "a part of a message"),
    "a part without text": (_of({"role": "user", "content": [{"type": "text"}]}, A), "a part of a message"),
    "an empty question": (_of({"role": "user", "content": " \n"}, A), "empty turn"),
    "an empty answer inside": (_of(U, {"role": "assistant", "content": ""}, U, A), "empty turn"),
    "only a question": (_of(U), "no answer"),
    "only an answer": (_of(A), "no question"),
    "only a system prompt": (_of({"role": "system", "content": "s"}), "no question"),
    "a late system prompt": (_of(U, A, {"role": "system", "content": "s"}, U, A), "a system prompt after"),
    "system prompts that differ": (_of({"role": "system", "content": "s"}, U, A, system="t"), "two system prompts"),
    "a question without an answer": ('{"question": "q", "answer": null}', "no answer"),
    "an answer without a question": ('{"question": "", "answer": "a"}', "no question"),
    "an answer that is a list": ('{"question": "q", "answer": ["a", "b"]}', "a turn is not an object"),
    "an answer that is an object": ('{"question": "q", "answer": {"text": "a"}}', "the answer is not a text"),
    "history of another form": ('{"query": "q", "response": "a", "history": [["x"]]}', "history is not a list"),
    "history as text": ('{"query": "q", "response": "a", "history": "x"}', "history is not JSON"),
    "a chosen answer without a prompt": ('{"chosen": "a", "rejected": "b"}', "no prompt for the chosen answer"),
    "an empty text": ('{"text": ""}', "empty text"),
    "video": (_of(U, A, videos=["a.mp4"]), "video or audio"),
    "tools without names": (_of(U, A, tools=[{"type": "function"}]), "a tool without a name"),
    "tools as a number": (_of(U, A, tools=3), "tools is not a list of objects"),
    "tools as broken JSON": (_of(U, A, tools="[{"), "tools is not JSON"),
    "a number in tools that JSON cannot hold": (
        _of(U, A)[:-1] + ', "tools": [{"name": "f", "x": 1e999}]}', "tools cannot be written"),
    "a surrogate in the JSON of tools": (_of(U, A, tools='[{"name": "\\ud800"}]'), "tools is not JSON"),
    "a tool call without a name": (_of(U, _calling({"function": {}})), "a tool call without a name"),
    "arguments as a list": (_of(U, _calling({"name": "f", "arguments": [1]})), "arguments of a tool call"),
    "arguments as broken JSON": (_of(U, _calling({"name": "f", "arguments": "{"})), "arguments of a tool call"),
    "a call without JSON": (_of(U, {"role": "tool_call", "content": "f()"}), "a tool call is not JSON"),
    "a response without a call": (_of(U, {"role": "tool", "content": "x"}, A), "a tool's response without a call"),
    "a call without a response": (
        _of(U, {"role": "assistant", "tool_calls": [CALL]}, A), "a tool call without a response"),
    "a picture that is missing": (_of(U, A, images=["none.png"]), "picture cannot be read"),
    "a picture outside": (_of(U, A, images=["../../etc/passwd"]), "picture outside the data folder"),
    "a picture that is none": (_of(U, A, image="data:image/png;base64,AAAA"), "not a picture"),
    "a picture that is not base64": (_of(U, A, image="data:image/png,xx"), "a data: URI that is not base64"),
    "a picture on the network": (_of(U, A, image="https://a.example/b.png"), "a picture on the network"),
    "a picture with a long name": (_of(U, A, image="x" * 5000), "picture cannot be read"),
    "a picture with a null byte": (_of(U, A, image="x\0y"), "picture cannot be read"),
    "a picture as a number": (_of(U, A, images=[3]), "a picture without a path"),
    "more places than pictures": (
        _of({"role": "user", "content": "<image><image>"}, A, images=["a.png"]), "not one <image> for each picture"),
    "a picture in an answer": (
        _of(U, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}), "a picture in an answer"),
}  # fmt: skip
"""A record by what is odd about it: its JSON, and what has to be read, or why it is skipped."""

AFTER = [("user", "last question"), ("assistant", "last answer")]


def odd_files() -> Iterator[OddFile]:
    """A file for each odd record, between whole ones, and files that are damaged themselves."""
    before, after = lines([as_messages(QA)]), lines([as_messages(AFTER)])
    for name, (record, wanted) in ODD.items():
        skipped = [(":2", wanted)] if isinstance(wanted, str) else []
        read = [QA, *([] if skipped else [wanted]), AFTER]
        yield OddFile(f"{name.replace('/', ' ')}.jsonl", (before + record + "\n" + after).encode(), read, skipped)
    yield from damaged_files()
    yield from damaged_tables()


def damaged_files() -> Iterator[OddFile]:
    """Files that are damaged, or are none."""
    before, after = lines([as_messages(QA)]), lines([as_messages(AFTER)])
    whole = parquet([as_messages(QA), as_messages(AFTER)])
    yield OddFile("empty.jsonl", b"", [])
    yield OddFile("empty.json", b"", [])
    yield OddFile("empty.csv", b"", [])
    yield OddFile("only a byte order mark.jsonl", b"\xef\xbb\xbf", [])
    yield OddFile("only white space.json", b" \n\n ", [])
    yield OddFile("an empty array.json", b"[]", [])
    yield OddFile("only a header.csv", b"question,answer\n", [])
    yield OddFile("empty.parquet", b"", [], [(" row 1", "unreadable file")])
    yield OddFile("cut off.parquet", whole[:-20], [], [(" row 1", "unreadable file")])
    yield OddFile("not.parquet", b"PAR1" + b"x" * 50 + b"PAR1", [], [(" row 1", "unreadable file")])
    yield OddFile("empty.arrow", b"", [], [(" row 1", "unreadable file")])
    yield OddFile("cut off.arrow", arrow([as_messages(QA)])[:-40], [], [(" row 1", "unreadable file")])
    yield OddFile("a stream.arrow", arrow([as_messages(QA)], stream=True), [QA])
    yield OddFile("blank lines.jsonl", (before + "\n \r\n\n" + after).encode(), [QA, AFTER])
    yield OddFile("Windows line ends.jsonl", (before + after).replace("\n", "\r\n").encode(), [QA, AFTER])
    yield OddFile("no line end.jsonl", (before + after).rstrip().encode(), [QA, AFTER])
    yield OddFile("lines.json", (before + after).encode(), [QA, AFTER])
    yield OddFile("an array.jsonl", json.dumps([as_messages(QA), as_messages(AFTER)]).encode(), [QA, AFTER])
    array = json.dumps([as_messages(QA), as_messages(AFTER), as_messages(QA)], indent=1)
    yield OddFile("cut off.json", array[:-30].encode(), [QA, AFTER], [(":", "cut off")])
    yield OddFile("a comma at the end.json", (array[:-2] + ",\n]").encode(), [QA, AFTER, QA])
    latin = b'{"question": "caf\xe9?", "answer": "a"}\n'
    yield OddFile("Latin-1.jsonl", before.encode() + latin + after.encode(), [QA, AFTER], [(":2", "not UTF-8")])
    yield OddFile("zero bytes.jsonl", before.encode() + b"\0\0\0\n" + after.encode(), [QA, AFTER], [(":2", "not JSON")])


def damaged_tables() -> Iterator[OddFile]:
    """Tables that are damaged."""
    head = "question,answer\n"
    two = [[("user", "a,b"), ("assistant", 'c\n\nd "e" ')], AFTER]
    good = '"a,b","c\n\nd ""e"" "\n'
    last = "last question,last answer\n"
    yield OddFile("quotes and line breaks.csv", (head + good + last).encode(), two)
    yield OddFile("blank lines.csv", ("\n" + head + "\n" + good + "\n" + last).encode(), two)
    yield OddFile("no line end.csv", (head + good + last.rstrip()).encode(), two)
    yield OddFile("too few cells.csv", (head + "alone\n" + last).encode(), [AFTER], [(":2", "not one cell")])
    yield OddFile("too many cells.csv", (head + good + "a,b,c\n" + last).encode(), two, [(":5", "not one cell")])
    yield OddFile("a stray quotation mark.csv", (head + '"a"b,c\n' + last).encode(), [AFTER], [(":2", "not CSV")])
    yield OddFile("an open quotation mark.csv", (head + last + '"a,b\n').encode(), [AFTER], [(":3", "not CSV")])
    yield OddFile(
        "marks inside.csv", (head + '5" long,6" too\n').encode(), [[("user", '5" long'), ("assistant", '6" too')]]
    )
    yield OddFile("a column twice.csv", b"question,answer,answer\na,b,c\n", [], [(":1", "a column that comes twice")])
    yield OddFile("an unnamed column.csv", b",question,answer\n0,q,a\n", [QA])
    yield OddFile("columns in capitals.csv", b" Question , ANSWER\nq,a\n", [QA])
    yield OddFile(
        "empty cells.csv", (head + ",a\nq,\n" + last).encode(), [AFTER], [(":2", "no question"), (":3", "no answer")]
    )
    yield OddFile("bars.csv", b"question|answer\nq, or not|a\n", [[("user", "q, or not"), ("assistant", "a")]])
    yield OddFile("no header.csv", b"what?,this\nhow?,so\n", [], [(":2", "no known form")])
    history = 'query,response,history\nq,a,"[[""x"", ""y""]]"\nq,a,"[[""x"""\n'
    yield OddFile("JSON in cells.csv", history.encode(), [[("user", "x"), ("assistant", "y"), *QA]], [
        (":3", "history is not JSON"),
    ])  # fmt: skip
    floats = pa.table({"question": ["q", "p", None], "answer": [1.0, None, 2.5]})
    sink = io.BytesIO()
    pq.write_table(floats, sink)
    yield OddFile("numbers and nulls.parquet", sink.getvalue(), [[("user", "q"), ("assistant", "1")]], [
        (" row 2", "no answer"), (" row 3", "no known form"),
    ])  # fmt: skip
    odd = pa.table({"question": ["q", "p"], "answer": pa.array([b"a", b"b"])})
    sink = io.BytesIO()
    pq.write_table(odd, sink)
    yield OddFile("bytes.parquet", sink.getvalue(), [], [
        (" row 1", "the answer is not a text"), (" row 2", "the answer is not a text"),
    ])  # fmt: skip


PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""A picture of one pixel."""
