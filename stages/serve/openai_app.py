"""A server that speaks OpenAI's interface over the transformers engine, for what vLLM cannot serve.

`transformers serve` has no token and no adapters by name (transformers 5.19). Endpoints: /v1/models,
/v1/chat/completions, /v1/completions, /health, and /metrics for Prometheus. As with vLLM, only /v1 needs the token.
"""

import asyncio
import json
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stages.contract.errors import DataError, LorryError, UsageError
from stages.engines.engine import Completion
from stages.models.rendering import Prompt
from stages.serve.requests import ChatRequest, Prompts, Request, TextRequest
from stages.serve.tool_calls import Reading
from stages.serve.worker import Job, Worker


class _UnknownModelError(UsageError):
    """A request names a model that is not served."""


class Metrics:
    """What /metrics shows."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        label = ("model",)
        self.requests = Counter("lorry_requests", "Requests by status code", ("code",), registry=self.registry)
        self.prompt = Counter("lorry_prompt_tokens", "Tokens of prompts", label, registry=self.registry)
        self.generated = Counter("lorry_generation_tokens", "Tokens of completions", label, registry=self.registry)
        self.first = Histogram(
            "lorry_time_to_first_token_seconds", "Seconds to a completion's first text", label, registry=self.registry
        )
        self.seconds = Histogram(
            "lorry_request_seconds", "Seconds of a request until its last token", label, registry=self.registry
        )
        Gauge("lorry_requests_running", "Requests being answered", registry=self.registry).set_function(
            lambda: worker.running
        )
        Gauge("lorry_requests_waiting", "Requests that wait", registry=self.registry).set_function(
            lambda: worker.waiting
        )


class _Token:
    """Middleware that refuses requests below /v1 without the token."""

    def __init__(self, app: ASGIApp, token: str, metrics: Metrics) -> None:
        self._app, self._wanted, self._metrics = app, f"Bearer {token}".encode(), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(sent, self._wanted):
                self._metrics.requests.labels(401).inc()
                await _error(401, "authorization: wrong or missing token; send `Bearer` and the server's token")(
                    scope, receive, send
                )
                return
        await self._app(scope, receive, send)


def openai_app(worker: Worker, prompts: Prompts, models: list[dict[str, Any]], token: str | None) -> Starlette:
    """The application. `models` are the entries of /v1/models; without `token`, everybody may use it."""
    metrics, began, names = Metrics(worker), int(time.time()), [model["id"] for model in models]

    async def list_models(_: HttpRequest) -> Response:
        """Answer /v1/models."""
        entries = [{"object": "model", "created": began, "owned_by": "lorry", **model} for model in models]
        return JSONResponse({"object": "list", "data": entries})

    async def health(_: HttpRequest) -> Response:
        """Answer /health."""
        return Response()

    async def show_metrics(_: HttpRequest) -> Response:
        """Answer /metrics."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    def endpoint(kind: type[Request], chat: bool) -> Callable[[HttpRequest], Any]:
        """The function that answers an endpoint whose requests are of this kind."""

        async def answer(http: HttpRequest) -> Response:
            """Answer one request, as a whole or as a stream."""
            try:
                response = await _answer(http, kind, chat)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"])) or "body"
                response = _error(400, f"{place}: {first['msg']}; see OpenAI's API reference")
            except ClientDisconnect:
                response = Response(status_code=499)
            except LorryError as error:
                refused = 400 if isinstance(error, UsageError | DataError) else 503
                response = _error(404 if isinstance(error, _UnknownModelError) else refused, str(error))
            metrics.requests.labels(response.status_code).inc()
            return response

        return answer

    async def _answer(http: HttpRequest, kind: type[Request], chat: bool) -> Response:
        """The response to a request. Raises ValidationError, ClientDisconnect and LorryError if there is no answer."""
        request = kind.model_validate_json(await http.body())
        if request.model not in names:
            raise _UnknownModelError(f"model: {request.model!r} is not served; known models: {', '.join(names)}")
        folder = tempfile.TemporaryDirectory(prefix="lorry-pictures-")
        try:
            prompt = await asyncio.to_thread(_prompt, request, Path(folder.name))
        except BaseException:
            folder.cleanup()
            raise
        tools = request.usable_tools if isinstance(request, ChatRequest) else []
        reading = prompts.calls.begin(prompt.tokens, tools) if tools else None
        reply = _Reply(worker, metrics, request, prompt, chat, folder, reading)
        if request.stream:
            return StreamingResponse(reply.events(), media_type="text/event-stream")
        return JSONResponse(await reply.whole(http))

    def _prompt(request: Request, folder: Path) -> Prompt:
        """The prompt of a request."""
        request.refuse_unsupported()
        if isinstance(request, ChatRequest):
            return prompts.of_chat(request, folder)
        assert isinstance(request, TextRequest)
        return prompts.of_text(request)

    routes = [
        Route("/v1/models", list_models),
        Route("/v1/chat/completions", endpoint(ChatRequest, True), methods=["POST"]),
        Route("/v1/completions", endpoint(TextRequest, False), methods=["POST"]),
        Route("/health", health),
        Route("/metrics", show_metrics),
    ]
    guard = [Middleware(_Token, token=token, metrics=metrics)] if token else []
    return Starlette(routes=routes, middleware=guard)


class _Reply:
    """The answer to one request, while the worker writes it."""

    def __init__(
        self,
        worker: Worker,
        metrics: Metrics,
        request: Request,
        prompt: Prompt,
        chat: bool,
        folder: tempfile.TemporaryDirectory[str],
        reading: Reading | None,
    ) -> None:
        """Submit the prompt. `folder` has its pictures, and is deleted after the answer. `reading` finds the tool calls
        in it; None without tools."""
        self._reading = reading
        self._metrics, self._request, self._prompt, self._chat, self._folder = metrics, request, prompt, chat, folder
        self._began, self._loop = time.monotonic(), asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[str, Completion | Exception | None]] = asyncio.Queue()
        self._name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._job = Job(request.model, prompt, request.stops, self._tell)
        worker.submit(self._job)

    def _tell(self, text: str, end: Completion | Exception | None) -> None:
        """Hand a text or the end over to the server's thread. The worker calls this in its own."""
        self._loop.call_soon_threadsafe(self._told.put_nowait, (text, end))

    async def _texts(self) -> AsyncIterator[tuple[str, Completion | None]]:
        """Yield the text so far each time that it grows, the last one with the completion.

        Raises what the engine raised. If nobody takes the texts any more, the completion ends early.
        """
        first = True
        try:
            while True:
                text, end = await self._told.get()
                if isinstance(end, Exception):
                    raise end
                name, seconds = self._request.model, time.monotonic() - self._began
                if first:
                    self._metrics.first.labels(name).observe(seconds)
                    first = False
                if end is not None:  # before the last text, after which nobody may ask again
                    self._metrics.prompt.labels(name).inc(self._prompt.length)
                    self._metrics.generated.labels(name).inc(end.tokens)
                    self._metrics.seconds.labels(name).observe(seconds)
                yield text, end
                if end is not None:
                    return
        finally:
            self._job.cancelled.set()
            self._folder.cleanup()

    async def whole(self, http: HttpRequest) -> dict[str, Any]:
        """The whole answer. Raises ClientDisconnect if the client is gone, and what the engine raised."""

        async def last() -> Completion:
            """The completion."""
            ends = [end async for _, end in self._texts() if end is not None]
            return ends[0]

        task = asyncio.create_task(last())
        try:
            while not (await asyncio.wait({task}, timeout=1))[0]:
                if await http.is_disconnected():
                    raise ClientDisconnect
            end = task.result()
        finally:
            task.cancel()
        message: dict[str, Any] = {"role": "assistant", "content": end.text}
        reason = end.finish_reason
        if self._reading is not None:
            self._reading.read(end.text)
            self._reading.end()
            message = {
                "role": "assistant",
                "content": self._reading.content or (None if self._reading.calls else ""),
                **self._calls(),
            }
            reason = "tool_calls" if self._reading.calls else reason
        said = {"message": message} if self._chat else {"text": end.text}
        return {**self._head(), "choices": [self._choice(said, reason)], "usage": self._usage(end)}

    def _calls(self) -> dict[str, Any]:
        """The tool calls of an answer that is read, and its thoughts, if it has any."""
        assert self._reading is not None
        thoughts = {"reasoning_content": self._reading.thoughts} if self._reading.thoughts else {}
        return {**thoughts, **({"tool_calls": self._reading.calls} if self._reading.calls else {})}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events, as OpenAI's clients read them."""
        wants_usage = self._request.stream_options is not None and self._request.stream_options.include_usage
        sent = ""
        if self._chat:
            yield self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])
        try:
            async for text, end in self._texts():
                # a tokenizer may write the last word anew; what is sent stays
                new, sent = (text[len(sent) :], text) if text.startswith(sent) else ("", sent)
                reason = end.finish_reason if end is not None else None
                if self._reading is not None:
                    new = self._reading.read(sent) + (self._reading.end() if end is not None else "")
                if new:
                    said = {"delta": {"content": new}} if self._chat else {"text": new}
                    yield self._event([self._choice(said, None)])
                if end is not None:
                    last: dict[str, Any] = {"delta": {}}
                    if self._reading is not None and self._reading.calls:
                        last["delta"] = self._calls()
                        last["delta"]["tool_calls"] = [
                            {"index": place, **call} for place, call in enumerate(self._reading.calls)
                        ]
                        reason = "tool_calls"
                    yield self._event([self._choice(last if self._chat else {"text": ""}, reason)])
                    if wants_usage:
                        yield self._event([], usage=self._usage(end))
        except LorryError as error:
            yield f"data: {json.dumps(_error_body(503, str(error)))}\n\n"
        yield "data: [DONE]\n\n"

    def _head(self, chunk: bool = False) -> dict[str, Any]:
        """What every response begins with."""
        kind = f"chat.completion{'.chunk' if chunk else ''}" if self._chat else "text_completion"
        return {"id": self._name, "object": kind, "created": self._created, "model": self._request.model}

    def _choice(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        """The only entry of `choices`."""
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def _usage(self, end: Completion) -> dict[str, int]:
        """The numbers of tokens."""
        asked = self._prompt.length
        return {"prompt_tokens": asked, "completion_tokens": end.tokens, "total_tokens": asked + end.tokens}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        """A server-sent event."""
        return f"data: {json.dumps({**self._head(True), 'choices': choices, **more}, ensure_ascii=False)}\n\n"


def _error_body(code: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 503: "server_error"}
    return {
        "error": {"message": message, "type": kinds.get(code, "invalid_request_error"), "param": None, "code": code}
    }


def _error(code: int, message: str) -> JSONResponse:
    """The response for an error."""
    return JSONResponse(_error_body(code, message), status_code=code)
