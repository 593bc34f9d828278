"""Conversations with tools, thoughts and several turns, for chat templates of the published models' forms: tokens and
labels are those of a second rendering, written in Python."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from stages.contract.errors import UsageError
from stages.models.chat_settings import ChatSettings
from stages.models.control_words import STAND_IN
from stages.models.rendering import UNLEARNT, Renderer
from tests.models.chat_models import KINDS, chat_model, small_tokenizer
from tests.models.published_forms import FORMS, C, Form, merged

Messages = list[dict[str, Any]]
SPACES = "\r\n\t 部件 \u200b🙂 \n\n"


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Renderer]:
    """A function that returns the renderer of a form, the same for all tests."""
    folder = tmp_path_factory.mktemp("models")
    source = small_tokenizer(folder / "source")

    @cache
    def renderer_of(name: str) -> Renderer:
        kind = FORMS[name].kind
        assert kind.template is not None
        date = "2026-02-03" if "strftime_now" in kind.template else None
        return Renderer(chat_model(folder / name, kind, source), ChatSettings(date=date))

    return renderer_of


@cache
def plain_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a model without control words: every text is text."""
    values = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    return Tokenizer.from_str(json.dumps({**values, "added_tokens": []}))


def encoded(renderer: Renderer, pieces: list[str]) -> list[int]:
    """The tokens of a text in pieces."""
    tokenizer, plain = renderer.tokenizer, plain_tokenizer(Path(renderer.tokenizer.name_or_path))
    return [
        token
        for piece in merged(pieces)
        for token in (
            [tokenizer.convert_tokens_to_ids(str(piece))]
            if isinstance(piece, C)
            else plain.encode(piece, add_special_tokens=False).ids
        )
    ]


def check(renderer: Renderer, form: Form, messages: Messages, tools: Messages) -> None:
    """Check that each answer is learnt once, after the tokens of inference, and nothing else."""
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [
        (encoded(renderer, form.prompt(messages[:place], tools)), encoded(renderer, form.answer(messages[place])))
        for place in places
    ]
    found = []
    given: Any = messages
    for sequence in renderer.training_sequences(given, tools=tools):
        labels = [UNLEARNT, *sequence.labels, UNLEARNT]
        starts = [place for place, label in enumerate(labels[1:]) if label != UNLEARNT == labels[place]]
        for start in starts:
            end = start + labels[start + 1 :].index(UNLEARNT)
            assert sequence.labels[start:end] == sequence.tokens[start:end]
            found.append((sequence.tokens[:start], sequence.tokens[start:end]))
    decode = renderer.tokenizer.decode
    assert sorted(map(readable(decode), found)) == sorted(map(readable(decode), wanted))
    assert sorted(found) == sorted(wanted)
    for place, (prompt, _) in zip(places, wanted, strict=True):
        assert renderer.render("x", given[:place], tools=tools).tokens == prompt
    (last,) = renderer.training_sequences(given, only_last=True, tools=tools)
    assert [label for label in last.labels if label != UNLEARNT] == wanted[-1][1]


def readable(decode: Callable[[list[int]], str]) -> Callable[[tuple[list[int], list[int]]], tuple[str, str]]:
    return lambda pair: (decode(pair[0]), decode(pair[1]))


def words_of(form: Form) -> str:
    """All control words of a form, which data say as text."""
    return " ".join((*form.kind.words, *form.kind.tags, "<|im_end|>", "<|endoftext|>"))


def tool(name: str, said: str = "") -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    return {"type": "function", "function": {"name": name, "description": f"Say {said}.", "parameters": parameters}}


def call(name: str, number: int, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": f"call{number:05}", "function": function}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05}", "name": "weather", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


def talk(form: Form) -> Messages:
    """Two questions; all texts say control words, the answers only special ones."""
    words, special = words_of(form), " ".join((*form.kind.words, "<|im_end|>", "<|endoftext|>"))
    return [
        {"role": "system", "content": f"Be brief.{SPACES}{words}!"},
        user(f"A?{SPACES}{words}?"),
        said(f"Yes: {special}.{SPACES}It is."),
        user("B? 部件3是什么？"),
        said("No."),
    ]


def talk_with_tools(form: Form) -> Messages:
    """Calls alone, two at once, and beside a text; results; answers after them."""
    words = words_of(form)
    arguments = {"place": f'北京 "{words}" \\ \n', "days": [1, 2.5, None], "deep": {"kind": "x<y>&z'"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        user("What is the weather?"),
        {"role": "assistant", "tool_calls": [call("weather", 1, **arguments)]},
        result(1, f'{{"sky": "{words}"}}'),
        said("It rains."),
        user("And tomorrow?"),
    ]
    second = said("", tool_calls=[call("weather", 2, place="北京"), call("time", 3, place="北京")])
    if form.calls > 1:
        messages += [second, result(2, "dry"), result(3, "noon")]
    if form.text_with_call:
        messages += [said("I look.", tool_calls=[call("weather", 4, place="北京")]), result(4, "dry")]
    return [*messages, said("It is dry.")]


def with_thoughts(messages: Messages, words: str) -> Messages:
    """The messages with thoughts that say control words in each answer without a text beside a tool call."""
    thought = f"Hm.\n\n{words} so"
    return [
        {**one, "reasoning_content": thought}
        if one["role"] == "assistant" and not (one.get("content") and one.get("tool_calls"))
        else one
        for one in messages
    ]


@pytest.mark.parametrize("name", FORMS)
def test_several_turns(renderer: Callable[..., Renderer], name: str) -> None:
    check(renderer(name), FORMS[name], talk(FORMS[name]), [])
    check(renderer(name), FORMS[name], talk(FORMS[name])[1:3], [])


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.calls])
def test_tools_calls_and_results(renderer: Callable[..., Renderer], name: str) -> None:
    form = FORMS[name]
    tools = [tool("weather", words_of(form)), tool("time")] if form.tools else []
    check(renderer(name), form, talk_with_tools(form), tools)


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.thoughts])
def test_thoughts(renderer: Callable[..., Renderer], name: str) -> None:
    form = FORMS[name]
    words = words_of(form)
    check(renderer(name), form, with_thoughts(talk(form), words), [])
    tools = [tool("weather"), tool("time")] if form.tools else []
    check(renderer(name), form, with_thoughts(talk_with_tools(form), words), tools)


@pytest.mark.parametrize("name", FORMS)
def test_all_that_a_form_has_passes_the_check(renderer: Callable[..., Renderer], name: str) -> None:
    form, own = FORMS[name], renderer(name)
    lines = own.check_template()
    ends = [line for line in lines if "no end token" in line]
    assert ends == (
        ["the chat template writes no end token after an answer: training adds '<|user|>'"] if name == "glm-4" else []
    )
    given: Any = talk(form)
    assert own.check_conversation(given) == []
    if form.calls:
        calling: Any = talk_with_tools(form)
        assert own.check_conversation(calling, [tool("weather")] if form.tools else []) == []
        assert own.template.writes_text_beside_calls == form.text_with_call
    assert bool(own.template.stripped_roles & {"user", "assistant"}) == form.strips
    assert own.template.knows_thoughts == form.thoughts


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if not form.calls])
def test_a_template_without_tools_refuses_them(renderer: Callable[..., Renderer], name: str) -> None:
    form, own = FORMS[name], renderer(name)
    given: Any = talk(form)
    with pytest.raises(UsageError, match=r"leaves out the tools; set model.chat_template to a .jinja file that writes"):
        own.check_conversation(given, [tool("weather")])
    calling: Any = [*talk(form)[:2], said("", tool_calls=[call("weather", 1, place="x")])]
    with pytest.raises(UsageError, match=r"leaves out the tool call 'weather'|refuses a conversation"):
        own.check_conversation(calling)
    with pytest.raises(UsageError, match=r"leaves out the tool call 'weather'|refuses a conversation"):
        own.training_sequences(calling)


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}", "", "leaves out the tools"),
        (", \"arguments\": ' + (call.arguments | tojson) + '}", "}", "leaves out '"),
        ("{%- for call in m.tool_calls -%}", "{%- for call in [] -%}", "leaves out the tool call 'weather'"),
        (
            "{%- for call in m.tool_calls -%}",
            "{%- for call in (m.tool_calls or [])[:1] -%}",
            "leaves out the tool call 'time'",
        ),
        ("<tool_response>\n' + m.content + '", "<tool_response>\n", "leaves out a message of the role tool"),
        ("user\n' + said +", "user\n' + (said if loop.index < 4 else '') +", "leaves out a message of the role user"),
    ],
)
def test_a_template_that_loses_a_part_is_refused(tmp_path: Path, was: str, becomes: str, message: str) -> None:
    form = FORMS["qwen2.5"]
    template = form.kind.template or ""
    assert was in template
    kind = replace(form.kind, template=template.replace(was, becomes))
    model = chat_model(tmp_path / "model", kind, small_tokenizer(tmp_path / "source"))
    calling: Any = talk_with_tools(form)
    own = Renderer(model)
    own.check_template()
    with pytest.raises(UsageError) as refused:
        own.check_conversation(calling, [tool("weather"), tool("time")])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_thoughts_that_a_prompt_begins_are_ended_before_a_call(renderer: Callable[..., Renderer]) -> None:
    """As DeepSeek-V3.1 thinks, whose prompts begin no thoughts after a result."""
    model = Path(renderer("deepseek-v3.1").tokenizer.name_or_path)
    own, calls = Renderer(model, ChatSettings(enable_thinking=True)), [call("weather", 1, place="x")]
    given: Any = [user("A?"), said("", tool_calls=calls, reasoning_content="Hm."), result(1, "wet")]
    given += [said("Rain.", reasoning_content="So.")]
    learnt = [[label for label in one.labels if label != UNLEARNT] for one in own.training_sequences(given)]
    written = '<|calls|><|call|>weather<|sep|>{"place": "x"}<|call_end|><|calls_end|><|end_of_text|>'
    texts = [own.tokenizer.decode(one) for one in learnt]
    assert texts == [f"Hm.\n</think>{written}", "<think>\nSo.\n</think>\n\nRain.<|end_of_text|>"]
    prompt = own.tokenizer.decode(own.render("x", given[:-1]).tokens)
    assert prompt == f"<|begin|><|User|>A?<|Assistant|></think>{written}<|output|>wet<|output_end|>"


def test_calls_that_a_template_drops_beside_a_text_are_refused(renderer: Callable[..., Renderer]) -> None:
    given: Any = [user("A?"), said("I look.", tool_calls=[call("weather", 1, place="x")])]
    with pytest.raises(UsageError, match=r"leaves out the tool call 'weather'; set model.chat_template"):
        renderer("deepseek-r1").training_sequences(given)


def test_ids_that_a_template_refuses_are_shortened(renderer: Callable[..., Renderer]) -> None:
    form = FORMS["mistral-v3"]
    long: Any = json.loads(json.dumps(talk_with_tools(form)).replace("call0000", "call_00000000"))
    tokens = renderer("mistral-v3").render("x", long[:-1], tools=[tool("weather")]).tokens
    text = renderer("mistral-v3").tokenizer.decode(tokens)
    ids = {part.partition('"')[0] for part in text.split('id": "')[1:]}
    assert len(ids) == 3 and all(len(one) == 9 for one in ids), "each result has the id of its call"


def test_thoughts_that_a_template_does_not_know_are_left_out(renderer: Callable[..., Renderer]) -> None:
    form, own = FORMS["phi-4"], renderer("phi-4")
    messages: Any = talk(form)
    thinking: Any = with_thoughts(talk(form), "so")
    assert own.training_sequences(thinking) == own.training_sequences(messages)


def test_a_call_that_the_content_writes_itself_is_a_call(renderer: Callable[..., Renderer]) -> None:
    """As data of Hermes' form have it."""
    body = '<tool_call>\n{"name": "weather", "arguments": {"place": "x"}}\n</tool_call>'
    texts: Any = [user("A?"), said(body)]
    calls: Any = [user("A?"), said("", tool_calls=[call("weather", 1, place="x")])]
    own = renderer("qwen2.5")
    assert own.training_sequences(texts) == own.training_sequences(calls)


# -- any conversation ----------------------------------------------------------------------------------------------

EXACT = ("qwen2.5", "internlm2", "phi-4", "glm-4", "gpt-oss", "mistral-v3", "deepseek-r1")
"""Forms that write every text as it is."""

ODD = ["\r\n", "\t", "  ", "\n\n", "\u200b", "\u2060", "\ufeff", "🙂", "👩\u200d🚀", "部件", "e\u0301", "\x00"]
OWN = ["\ue000", "\ue001", "\ue002", STAND_IN, "\U00020000", "\U0010fffd\U00100000", "lorry_probe"]
WORDS = sorted(
    {word for form in FORMS.values() for word in (*form.kind.words, *form.kind.tags)} | {"<image>", "<|im_end|>"}
)
TEXTS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*ODD, *OWN, *WORDS])), max_size=6).map("".join)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ANSWERS = TEXTS.filter(lambda text: not any(tag in text for tag in TAGS))
"""In an answer these are control words."""


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(EXACT), system=TEXTS, turns=st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3))
def test_every_text_arrives_in_the_model_as_it_is(
    renderer: Callable[..., Renderer], name: str, system: str, turns: list[tuple[str, str]]
) -> None:
    form, own = FORMS[name], renderer(name)
    if name == "deepseek-r1":
        turns = [(asked, answer.lstrip("\n")) for asked, answer in turns]
    messages = [{"role": "system", "content": system}]
    messages += [message for asked, answer in turns for message in (user(asked), said(answer))]
    given: Any = messages[:-1]
    tokens = own.render("x", given).tokens
    pieces = merged(form.prompt(messages[:-1], []))
    controls = {token for token, added in own.tokenizer.added_tokens_decoder.items()}
    parts: list[Any] = [[]]
    for token in tokens:
        if token in controls:
            parts += [C(own.tokenizer.decode([token])), []]
        else:
            parts[-1].append(token)
    decode = plain_tokenizer(Path(own.tokenizer.name_or_path)).decode
    texts = [part if isinstance(part, C) else decode(part, skip_special_tokens=False) for part in parts if part]
    assert texts == pieces
    check(own, form, messages, [])


@pytest.mark.parametrize("name", ["chatml", "end_of_all"])
def test_a_text_is_learnt_whole(tmp_path: Path, name: str) -> None:
    own = Renderer(chat_model(tmp_path / "model", KINDS[name], small_tokenizer(tmp_path / "source")))
    text = f"<|im_end|> {SPACES} <image> " * 40
    end = own.tokenizer.eos_token_id
    (whole,) = own.text_sequences(text, 10_000)
    assert whole.labels == whole.tokens and whole.tokens[-1] == end and whole.tokens.count(end) == 1
    assert own.tokenizer.decode(whole.tokens[:-1]) == text
    pieces = own.text_sequences(text, 100)
    assert [token for piece in pieces for token in piece.tokens] == whole.tokens
    assert len(pieces) == -(-len(whole.tokens) // 100) and all(80 < len(piece.tokens) <= 100 for piece in pieces)
    assert all(piece.labels == piece.tokens for piece in pieces)
    assert [piece.tokens for piece in own.text_sequences("", 16)] == [[end]]
