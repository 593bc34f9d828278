"""The requests of OpenAI's interface that the server over the transformers engine takes, as prompts.

Source: https://platform.openai.com/docs/api-reference/chat/create. What would change an answer and is not supported is
refused; other unknown fields are ignored.
"""

import base64
import binascii
import json
import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stages.contract.errors import DataError, UsageError
from stages.contract.records import PLACE, escape_places
from stages.models.rendering import Prompt, Renderer
from stages.serve.tool_calls import ToolCalls

UNSUPPORTED: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "logprobs": None,
    "top_logprobs": None,
    "logit_bias": None,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "functions": None,
    "function_call": None,
    "parallel_tool_calls": True,
    "response_format": None,
    "echo": False,
    "suffix": None,
}
"""Fields that are not supported, each with the value that changes nothing."""


class StreamOptions(BaseModel):
    """What a stream has besides texts."""

    include_usage: bool = False


class Request(BaseModel):
    """The fields that both endpoints share."""

    model_config = ConfigDict(extra="allow")

    model: str
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a completion."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)

    def refuse_unsupported(self) -> None:
        """Raise UsageError for a field in UNSUPPORTED that would change the answer."""
        for name, value in (self.model_extra or {}).items():
            neutral: tuple[Any, ...] = (UNSUPPORTED.get(name), None, {}, [], {"type": "text"})
            if name in UNSUPPORTED and not any(value == one for one in neutral):
                raise UsageError(f"{name}: this server does not support it; leave it out")


class ChatMessage(BaseModel):
    """One message; its content may be a list of texts and pictures."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class Function(BaseModel):
    """A tool's name, with its description and the JSON schema of its parameters."""

    model_config = ConfigDict(extra="allow")

    name: str


class Tool(BaseModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else [tool.model_dump() for tool in self.tools or ()]


class TextRequest(Request):
    """The body of /v1/completions."""

    prompt: str | list[int]


class Prompts:
    """Makes prompts of requests, with the renderer of the run."""

    def __init__(self, renderer: Renderer, max_length: int, max_pixels: int | None, sampling: dict[str, Any]) -> None:
        """`sampling` has `temperature` and `top_p` for requests that name none, where the model has such settings."""
        self._renderer, self._max_length, self._max_pixels = renderer, max_length, max_pixels
        self._sampling = sampling
        self.calls = ToolCalls(renderer)

    def of_chat(self, request: ChatRequest, folder: Path) -> Prompt:
        """The prompt of a conversation. Its pictures are written to `folder`.

        Raises UsageError for a conversation that the chat template refuses, or that is too long, and for tools whose
        calls could not be read; DataError for a picture that cannot be read.
        """
        if request.tool_choice not in (None, "none", "auto"):
            raise UsageError(f"tool_choice: found {request.tool_choice!r}; this server takes auto and none")
        if request.usable_tools and self.calls.problem:
            raise UsageError(f"tools: this server cannot read this model's calls: {self.calls.problem}; leave them out")
        messages, pictures = [], list[Path]()
        for message in request.messages:
            role = "system" if message.role == "developer" else message.role
            content = self._content(message, folder, pictures)
            messages.append({**_extras(message), "role": role, "content": content})
        prompt = self._renderer.render(
            "request",
            messages,  # type: ignore[arg-type]
            pictures,
            self._max_pixels,
            tools=request.usable_tools,
        )
        return self._limited(prompt, request, request.max_completion_tokens or request.max_tokens)

    def of_text(self, request: TextRequest) -> Prompt:
        """The prompt of a text, as it is, without a chat template. Raises UsageError if it is too long."""
        text = request.prompt
        tokens = self._renderer.tokenizer.encode(text) if isinstance(text, str) else text
        if not tokens or not all(0 <= token < len(self._renderer.tokenizer) for token in tokens):
            raise UsageError("prompt: is empty, or has a token that the tokenizer does not know; send a text")
        return self._limited(Prompt("request", list(tokens)), request, request.max_tokens or 16)

    def _content(self, message: ChatMessage, folder: Path, pictures: list[Path]) -> str:
        """The content of a message as text, with `<image>` for each picture, whose file is added to `pictures`."""
        if not isinstance(message.content, list):
            return escape_places(message.content or "")
        parts = []
        for part in message.content:
            if part.get("type") == "text":
                parts.append(escape_places(str(part.get("text", ""))))
            elif part.get("type") == "image_url":
                path = folder / f"picture-{len(pictures)}"
                path.write_bytes(_picture_bytes(part.get("image_url")))
                pictures.append(path)
                parts.append(PLACE)
            else:
                raise UsageError(f"messages: found a part of type {part.get('type')!r}; send text or image_url")
        return "".join(parts)

    def _limited(self, prompt: Prompt, request: Request, asked: int | None) -> Prompt:
        """The prompt with its limit of tokens and its sampling. Raises UsageError if no room is left for an answer."""
        room = self._max_length - prompt.length
        if room < 1:
            raise UsageError(
                f"messages: have {prompt.length} tokens, but prompt and answer may have {self._max_length}; send fewer,"
                " or serve with a larger --max-length"
            )

        def chosen(asked: float | None, name: str) -> float:
            """The request's own value, else that of the model, else 1."""
            return float(self._sampling.get(name, 1.0) if asked is None else asked)

        return Prompt(
            prompt.id,
            prompt.tokens,
            prompt.pictures,
            min(asked or room, room),
            chosen(request.temperature, "temperature"),
            chosen(request.top_p, "top_p"),
            secrets.randbits(31) if request.seed is None else abs(request.seed),
        )


def _extras(message: ChatMessage) -> dict[str, Any]:
    """What a message has besides role and content; the arguments of tool calls as objects, as templates take them."""
    found = dict(message.model_extra or {})
    for call in found.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except json.JSONDecodeError as error:
                raise UsageError(f"messages: the arguments of a tool call are not JSON ({error})") from error
    return found


def _picture_bytes(value: Any) -> bytes:
    """The file of a picture that a request holds as a `data:` URL. Raises UsageError for any other URL: this server
    fetches nothing."""
    url = value.get("url") if isinstance(value, dict) else value
    head, _, data = str(url).partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise UsageError(
            "image_url: is no data: URL in base64; send the picture itself, as this server fetches nothing"
        )
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise DataError(f"image_url: is not base64 ({error}); send the picture's bytes in base64") from error
