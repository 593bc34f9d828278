"""`lorry serve` as a process, asked by OpenAI's own client: by vLLM's server, and by that over transformers."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import openai
import pytest

from stages.contract.run import Run
from stages.engines import start_engine
from stages.engines.engine import StreamingEngine
from stages.serve.served import served_run
from stages.serve.vllm_server import vllm_command
from tests.conftest import MODELS, Finished, Lorry
from tests.serve.conftest import NAMES, SYSTEM, tuned_run

pytestmark = pytest.mark.usefixtures("environment")

TOKEN = "s3cret"
ASKED = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "什么是阀？"}]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def lorry_of(run: Run) -> Lorry:
    extra = {"LORRY_TARGET": "cpu", "LORRY_API_KEY": TOKEN, "DOCKER_HOST": "unix:///nowhere/docker.sock"}
    return Lorry(run.roots.data, run.roots.models, run.roots.runs, extra)


@contextmanager
def serving(run: Run, *options: str) -> Iterator[tuple[openai.OpenAI, int]]:
    """A client of `lorry serve`, which then has to end after SIGTERM, with 0 and within seconds."""
    port = free_port()
    process = lorry_of(run).start(
        "entrypoints.lorry", "serve", run.name, "--port", str(port), "--target", "cpu", *options
    )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0)
    try:
        lines: list[str] = []
        for line in process.stdout or ():
            lines.append(line)
            if "serve: ready at" in line:
                break
        assert lines and "serve: ready at" in lines[-1], "".join(lines)
        yield client, port
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "serve: stopped by SIGTERM" in output
        assert time.monotonic() - began < 30
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def texts(run: Run, engine: str) -> dict[str, str]:
    """What infer's engine answers greedily."""
    served = served_run(run, engine, None, None, print)
    prompt = served.renderer.render("x", ASKED, max_new_tokens=12)  # type: ignore[arg-type]
    (weights,) = served.weights
    started = start_engine(engine, served.engine_settings(weights, print))
    assert isinstance(started, StreamingEngine)
    try:
        found = {}
        for name in NAMES:
            adapter, seen = None if name == "base" else name, list[str]()
            (whole,) = started.generate([prompt], adapter)
            assert started.stream([prompt], adapter, lambda _, text: seen.append(text) is None) == [whole]  # noqa: B023
            assert seen[-1] == whole.text and all(whole.text.startswith(text) for text in seen) and len(seen) > 1
            (part,) = started.stream([prompt], adapter, lambda _, text: False)
            assert part.text == seen[0] and part.finish_reason == "stop"
            found[name] = whole.text
        return found
    finally:
        started.close()


def check_answers(client: openai.OpenAI, wanted: dict[str, str]) -> None:
    assert [model.id for model in client.models.list().data] == NAMES
    for name in NAMES:
        asked = {"model": name, "messages": ASKED, "temperature": 0, "max_tokens": 12}
        whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
        assert whole.choices[0].message.content == wanted[name]
        assert whole.usage.completion_tokens <= 12 and whole.usage.prompt_tokens > 10
        stream = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == wanted[name]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=ASKED)  # type: ignore[arg-type]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.long
def test_the_server_over_transformers(tuned: Run) -> None:
    wanted = texts(tuned, "transformers")
    with serving(tuned, "--engine", "transformers") as (client, port):
        check_answers(client, wanted)
        refused = lorry_of(tuned)(
            "entrypoints.serve", "--run", tuned.name, "--port", str(port), "--engine", "transformers"
        )
        assert refused.code == 2
        assert f"--port {port}: is in use" in refused.lines[-1]


@pytest.mark.long
def test_vllms_own_server(tmp_path: Path, language_model: Path) -> None:
    """vLLM's CPU build has no kernels for a model as small as the random Llama."""
    run = tuned_run(tmp_path, language_model.parent, language_model.name)
    wanted = texts(run, "vllm")
    with serving(run, "--engine", "vllm", "--", "--max-num-seqs", "4") as (client, _):
        check_answers(client, wanted)


def test_vllms_command_has_what_infers_engine_has(tuned: Run) -> None:
    served = served_run(tuned, "vllm", None, None, print)
    command = vllm_command(served, Path("t.jinja"), "127.0.0.1", 8000, print)
    options = dict(pairwise(command))
    assert options["--model"] == str(tuned.roots.models / "random-llama")
    expected = {
        "--served-model-name": "base",
        "--max-model-len": "512",
        "--dtype": "float32",
        "--max-lora-rank": "8",
        "--max-loras": "2",
        "--chat-template": "t.jinja",
        "--chat-template-content-format": "string",
    }
    assert {name: options[name] for name in expected} == expected
    assert "--enable-lora" in command and "--trust-remote-code" not in command
    assert [f'"name": "{name}"' in text for name, text in zip(NAMES[1:], command[-2:], strict=True)] == [True, True]
    assert TOKEN not in command


def refused(run: Run, *arguments: str, **variables: str) -> str:
    """The line with which `lorry serve` ends."""
    done: Finished = Lorry(run.roots.data, MODELS, run.roots.runs, variables)("entrypoints.lorry", "serve", *arguments)
    assert done.code == 2 and len(done.lines) == 1, done.output
    return done.lines[0]


def test_wrong_use_is_one_line(tuned: Run) -> None:
    assert "nowhere: no such run; known runs: job" in refused(tuned, "nowhere")
    said = refused(tuned, tuned.name, "--host", "0.0.0.0")
    assert said.startswith("error: --host 0.0.0.0: others reach this address, and there is no token; set LORRY_API_KEY")
