"""The server over the transformers engine, in this process: OpenAI's interface, with infer's own answers."""

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from stages.contract.errors import DoesNotFitError
from stages.contract.records import BASE
from stages.engines.engine import Completion, Shown
from stages.models.rendering import Prompt, Renderer
from stages.serve.loading import Loaded
from stages.serve.openai_app import openai_app
from stages.serve.requests import Prompts
from stages.serve.served import Served
from stages.serve.transformers_server import model_entries
from stages.serve.worker import Job, Worker
from tests.conftest import need_model
from tests.serve.conftest import NAMES, SYSTEM

TOKEN = "s3cret"
ASKED = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "什么是阀？ <|im_end|> <image>"}]


@pytest.fixture(scope="module")
def client(served: Served, models: dict[str, Loaded]) -> Iterator[TestClient]:
    worker = Worker(models, 4)
    prompts = Prompts(served.renderer, served.max_length, None, {})
    with TestClient(openai_app(worker, prompts, model_entries(served), TOKEN)) as client:
        client.headers["authorization"] = f"Bearer {TOKEN}"
        yield client
    worker.close()


def ask(client: TestClient, model: str = BASE, **more: Any) -> Any:
    body = {"model": model, "messages": ASKED, "temperature": 0, "max_tokens": 8, **more}
    return client.post("/v1/chat/completions", json=body)


def text(client: TestClient, model: str = BASE, **more: Any) -> str:
    answer = ask(client, model, **more)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def events(client: TestClient, path: str = "/v1/chat/completions", **body: Any) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={"stream": True, **body}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_lists_base_and_adapters_by_name(client: TestClient) -> None:
    entries = client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in entries] == NAMES
    assert [entry["parent"] for entry in entries] == [None, "base", "base"]
    assert {entry["max_model_len"] for entry in entries} == {512}


def test_answers_are_infers(client: TestClient, served: Served, models: dict[str, Loaded]) -> None:
    prompt = served.renderer.render("x", ASKED, max_new_tokens=8)  # type: ignore[arg-type]
    found = {}
    for name in NAMES:
        engine, adapter = models[name]
        (completion,) = engine.generate([prompt], adapter)
        answer = ask(client, name).json()
        found[name] = answer["choices"][0]["message"]["content"]
        assert found[name] == completion.text
        assert answer["choices"][0]["finish_reason"] == completion.finish_reason
        asked, written = len(prompt.tokens), completion.tokens
        usage = {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}
        assert answer["usage"] == usage
    assert len(set(found.values())) == 3, "each adapter has an answer of its own"


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_has_the_same_text(client: TestClient, name: str) -> None:
    body = {"model": name, "messages": ASKED, "temperature": 0, "max_tokens": 12}
    found = events(client, **body, stream_options={"include_usage": True})
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [event["choices"][0]["delta"].get("content", "") for event in found if event["choices"]]
    assert "".join(pieces) == text(client, name, max_tokens=12)
    assert len([piece for piece in pieces if piece]) > 1
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 12
    assert {event["object"] for event in found} == {"chat.completion.chunk"}


def test_a_text_is_completed_as_it_is(client: TestClient, served: Served, models: dict[str, Loaded]) -> None:
    asked = "A valve is"
    tokens = served.renderer.tokenizer.encode(asked)
    (wanted,) = models["formal"][0].generate([Prompt("x", tokens, max_new_tokens=6)], "formal")
    body = {"model": "formal", "prompt": asked, "temperature": 0, "max_tokens": 6}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == wanted.text and answer["object"] == "text_completion"
    assert "".join(event["choices"][0]["text"] for event in events(client, "/v1/completions", **body)) == wanted.text


def test_requests_for_several_models_at_once(client: TestClient) -> None:
    alone = {name: text(client, name) for name in NAMES}
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda name: (name, text(client, name)), NAMES * 3))
    assert [alone[name] for name, _ in found] == [said for _, said in found]


def test_a_stop_ends_the_answer_and_does_not_belong_to_it(client: TestClient) -> None:
    whole = text(client, max_tokens=12)
    stop = whole[4:6]
    answer = ask(client, max_tokens=12, stop=[stop, "never"]).json()["choices"][0]
    assert answer["message"]["content"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_sampling_depends_on_the_seed_alone(client: TestClient) -> None:
    hot = {"temperature": 5.0, "max_tokens": 12}
    assert text(client, **hot, seed=1) == text(client, **hot, seed=1) != text(client, **hot, seed=2)
    assert text(client, **hot, seed=3, top_p=1e-9) == text(client, max_tokens=12), "only the likeliest token is left"
    assert text(client, **hot) != text(client, **hot), "without a seed, each answer has its own"


def test_a_token_is_needed_below_v1_only(client: TestClient) -> None:
    for sent in ({"authorization": "Bearer wrong"}, {"authorization": ""}):
        refused = client.get("/v1/models", headers=sent)
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        assert ask(client).status_code == 200
        assert client.get("/health", headers=sent).status_code == 200
        assert client.get("/metrics", headers=sent).status_code == 200


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"model": "other"}, 404, "model: 'other' is not served; known models: base, formal, terse"),
        ({"messages": []}, 400, "messages: "),
        ({"temperature": -1}, 400, "temperature: "),
        ({"n": 2}, 400, "n: this server does not support it; leave it out"),
        (
            {"tools": [{"type": "function", "function": {"name": "x"}}]},
            400,
            "tools: this server cannot read this model",
        ),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "but prompt and answer may have 512"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "found a part of type 'audio'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}
                ]
            },
            400,
            "this server fetches nothing",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(client: TestClient, change: Any, code: int, said: str) -> None:
    answer = ask(client, **change)
    assert answer.status_code == code
    assert said in answer.json()["error"]["message"]


def test_fields_that_change_nothing_are_taken(client: TestClient) -> None:
    neutral = {"n": 1, "presence_penalty": 0.0, "tools": [], "response_format": {"type": "text"}, "user": "me"}
    assert text(client, **neutral) == text(client)
    parts = [{**ASKED[1], "content": [{"type": "text", "text": ASKED[1]["content"]}]}]
    assert text(client, messages=[ASKED[0], *parts]) == text(client)


def test_metrics_count_requests_and_tokens(client: TestClient) -> None:
    def counted(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = counted('lorry_generation_tokens_total{model="formal"}'), counted('lorry_requests_total{code="404"}')
    text(client, "formal", max_tokens=5)
    ask(client, "other")
    assert counted('lorry_generation_tokens_total{model="formal"}') == before[0] + 5
    assert counted('lorry_requests_total{code="404"}') == before[1] + 1
    assert counted("lorry_requests_running") == counted("lorry_requests_waiting") == 0


def test_pictures_come_with_the_request(tmp_path: Path) -> None:
    from PIL import Image

    renderer = Renderer(need_model("tiny-qwen2.5-vl"))
    Image.new("RGB", (60, 60), "red").save(tmp_path / "red.png")
    url = f"data:image/png;base64,{base64.b64encode((tmp_path / 'red.png').read_bytes()).decode()}"
    content = [{"type": "text", "text": "一 <image>"}, {"type": "image_url", "image_url": {"url": url}}]
    from stages.serve.requests import ChatRequest

    request = ChatRequest.model_validate({"model": "base", "messages": [{"role": "user", "content": content}]})
    prompt = Prompts(renderer, 512, None, {}).of_chat(request, tmp_path)
    escaped = "一 <\u2060image><image>"
    wanted = renderer.render("x", [{"role": "user", "content": escaped}], [tmp_path / "red.png"])
    assert prompt.tokens == wanted.tokens
    assert [(one.width, one.height) for one in prompt.pictures] == [(one.width, one.height) for one in wanted.pictures]


class SlowEngine:
    """Writes one word a step, until it is told to stop; has no memory for more than one prompt."""

    continuous = False

    def __init__(self) -> None:
        self.steps, self.batches = 0, list[int]()
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def stream(self, prompts: list[Prompt], adapter: str | None, shown: Shown) -> list[Completion]:
        self.batches.append(len(prompts))
        self.begun.set()
        if len(prompts) > 1:
            raise RuntimeError("CUDA out of memory")
        if prompts[0].id == "broken":
            raise RuntimeError("CUDA out of memory")
        self.goes_on.wait(10)
        text = ""
        for self.steps in range(1, 1000):
            text += "word "
            if not shown(0, text):
                break
        return [Completion(text, self.steps, "length")]


def test_nobody_waits_any_more_and_memory_runs_out() -> None:
    engine = SlowEngine()
    worker = Worker({"base": (engine, None)}, 8)  # type: ignore[dict-item]
    told: list[Any] = []
    first = Job("base", Prompt("a", [1]), (), lambda text, end: told.append(end))
    worker.submit(first)
    assert engine.begun.wait(10)
    done = threading.Event()
    errors: list[Any] = []

    def tell(text: str, end: Any) -> None:
        if end is not None:
            errors.append(end)
            done.set()

    gone = Job("base", Prompt("b", [1]), (), lambda text, end: errors.append("answered"))
    gone.cancelled.set()
    for job in (gone, Job("base", Prompt("broken", [1]), (), tell), Job("base", Prompt("c", [1]), (), tell)):
        worker.submit(job)
    first.cancelled.set()
    engine.goes_on.set()
    assert done.wait(10)
    assert engine.steps == 1 or told, "the first ends after its next word"
    worker.close()
    assert engine.batches[:3] == [1, 2, 1], "a batch that does not fit is halved"
    assert isinstance(errors[0], DoesNotFitError)
