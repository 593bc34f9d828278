"""Tool calls: what a template writes is read back, in one piece and as a stream; what cannot be read is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from stages.engines.engine import Completion, Shown
from stages.models.rendering import Prompt, Renderer
from stages.serve.openai_app import openai_app
from stages.serve.requests import Prompts
from stages.serve.tool_calls import ToolCalls
from stages.serve.worker import Worker
from tests.models.chat_models import HYBRID, Kind, chat_model
from tests.models.published_forms import GLM4, MISTRAL3, QWEN25

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
ARGUMENTS = [{"city": "北京", "days": 2}, {"city": "Oslo", "days": 1}]
ASKED: Any = [{"role": "user", "content": "北京的天气？"}]


class Writer:
    """Stands where an engine stands: writes the text that it is given, some letters a step."""

    continuous = False

    def __init__(self) -> None:
        self.text, self.prompts = "", list[Prompt]()

    def stream(self, prompts: list[Prompt], adapter: str | None, shown: Shown) -> list[Completion]:
        self.prompts += prompts
        for length in range(0, len(self.text), 7):
            shown(0, self.text[:length])
        return [Completion(self.text, 9, "stop")]


def renderer(folder: Path, kind: Kind) -> Renderer:
    return Renderer(chat_model(folder, kind))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return renderer(tmp_path_factory.mktemp("qwen"), QWEN25)


@pytest.fixture
def writer() -> Writer:
    return Writer()


@pytest.fixture
def client(qwen: Renderer, writer: Writer) -> Iterator[TestClient]:
    worker = Worker({"base": (writer, None)}, 1)  # type: ignore[dict-item]
    with TestClient(openai_app(worker, Prompts(qwen, 2048, None, {}), [{"id": "base"}], None)) as client:
        yield client
    worker.close()


def body(**more: Any) -> dict[str, Any]:
    return {"model": "base", "messages": ASKED, "tools": [WEATHER], **more}


def written(qwen: Renderer, content: str = "") -> str:
    """What the template has the model write to call the tool twice, as the engine decodes it."""
    calls = [
        {"id": f"{place}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for place, arguments in enumerate(ARGUMENTS)
    ]
    answer: Any = {"role": "assistant", "content": content, "tool_calls": calls}
    tokens = qwen.tokenizer.encode(qwen.template.turn([*ASKED, answer], [WEATHER]).completion)  # type: ignore[list-item]
    return str(qwen.tokenizer.decode(tokens, skip_special_tokens=True))


def arguments(calls: list[dict[str, Any]]) -> list[Any]:
    assert {call["type"] for call in calls} == {"function"} and len({call["id"] for call in calls}) == len(calls)
    assert {call["function"]["name"] for call in calls} == {"weather"}
    return [json.loads(call["function"]["arguments"]) for call in calls]


def streamed(client: TestClient, **more: Any) -> list[dict[str, Any]]:
    with client.stream("POST", "/v1/chat/completions", json=body(stream=True, **more)) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines]


def test_calls_come_back_as_openais(client: TestClient, writer: Writer, qwen: Renderer) -> None:
    writer.text = written(qwen, "看一下。")
    choice = client.post("/v1/chat/completions", json=body()).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].strip() == "看一下。"
    assert arguments(choice["message"]["tool_calls"]) == ARGUMENTS
    (asked,) = writer.prompts
    assert asked.tokens == qwen.render("x", ASKED, tools=[WEATHER]).tokens  # type: ignore[list-item]


def test_a_stream_has_the_text_as_it_comes_and_the_calls_at_the_end(
    client: TestClient, writer: Writer, qwen: Renderer
) -> None:
    writer.text = written(qwen, "看一下，这里有一个很长的句子。")
    choices = streamed(client)
    said = [choice["delta"].get("content") or "" for choice in choices]
    assert "".join(said).strip() == "看一下，这里有一个很长的句子。" and len([one for one in said if one]) > 1
    last = choices[-1]
    assert last["finish_reason"] == "tool_calls"
    assert [call["index"] for call in last["delta"]["tool_calls"]] == [0, 1]
    assert arguments(last["delta"]["tool_calls"]) == ARGUMENTS


@pytest.mark.parametrize(
    "text", ["晴天。", "<tool_call>\n{broken\n</tool_call>", '<tool_call>\n{"name": "weather"', '{"name": "weather"}']
)
def test_what_is_no_call_stays_text(client: TestClient, writer: Writer, text: str) -> None:
    writer.text = text
    choice = client.post("/v1/chat/completions", json=body()).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]) == ("stop", {"role": "assistant", "content": text})
    assert "".join(one["delta"].get("content") or "" for one in streamed(client)) == text


def test_a_broken_call_after_good_ones_loses_no_text(client: TestClient, writer: Writer, qwen: Renderer) -> None:
    writer.text = written(qwen, "看一下。") + "\n再看。\n<tool_call>\n{broken\n</tool_call>"
    said = "".join(one["delta"].get("content") or "" for one in streamed(client))
    assert said.startswith("看一下。") and said.endswith(writer.text)
    choice = client.post("/v1/chat/completions", json=body()).json()["choices"][0]
    assert choice["message"]["content"].endswith(writer.text) and "tool_calls" not in choice["message"]


def test_without_tools_or_with_none_chosen_nothing_is_read(client: TestClient, writer: Writer, qwen: Renderer) -> None:
    writer.text = written(qwen)
    for more in ({"tools": []}, {"tool_choice": "none"}):
        choice = client.post("/v1/chat/completions", json=body(**more)).json()["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", writer.text)
    assert {tuple(one.tokens) for one in writer.prompts} == {tuple(qwen.render("x", ASKED).tokens)}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tool_choice": "required"}, "tool_choice: found 'required'; this server takes auto and none"),
        ({"tools": [{"type": "function"}]}, "tools.0.function: Field required"),
    ],
)
def test_what_a_tool_may_not_be_is_refused(client: TestClient, more: dict[str, Any], said: str) -> None:
    refused = client.post("/v1/chat/completions", json=body(**more))
    assert (refused.status_code, said in refused.json()["error"]["message"]) == (400, True)


def test_a_results_turn_goes_into_the_prompt(client: TestClient, writer: Writer, qwen: Renderer) -> None:
    writer.text = written(qwen)
    message = client.post("/v1/chat/completions", json=body()).json()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "晴"} for call in message["tool_calls"]]
    writer.text = "晴天。"
    again = client.post("/v1/chat/completions", json=body(messages=[*ASKED, message, *results]))
    assert again.json()["choices"][0]["message"]["content"] == "晴天。"
    assert "北京" in qwen.tokenizer.decode(writer.prompts[-1].tokens).rpartition("tool_call")[0]


def test_the_folders_own_response_template_comes_first(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "own", QWEN25)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["response_template"] = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
            "tool_calls": {
                **{"open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json"},
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"content": "text"},
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    own = Renderer(folder)
    calls = ToolCalls(own)
    assert calls.problem is None
    reading = calls.begin(own.render("x", ASKED, tools=[WEATHER]).tokens, [WEATHER])  # type: ignore[list-item]
    reading.read(f"<think>想想</think>{written(own)}")
    reading.end()
    assert (reading.thoughts, reading.content.strip(), arguments(reading.calls)) == ("想想", "", ARGUMENTS)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (HYBRID, "lorry_probe"),
        (GLM4, "its chat template does not write calls as JSON between marks, and its folder has no response_template"),
        (MISTRAL3, "a call that its chat template writes is not read back from what the engine decodes"),
    ],
)
def test_a_model_whose_calls_cannot_be_read_says_why(tmp_path: Path, kind: Kind, said: str) -> None:
    problem = ToolCalls(renderer(tmp_path / "other", kind)).problem
    assert problem is not None and said in problem
