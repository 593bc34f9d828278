"""The records that stages hand to each other, as JSON Lines; joined by `id`, never by position.

A sample has the messages that chat templates take, so that training reads it unchanged, and what scoring needs. A
prediction is one model's answer to a sample; a failed one has `error` and no answer, and is counted.
"""

import re
from typing import Any, NotRequired, TypedDict

BASE, VOTE = "base", "vote"
"""Names of the untuned model and of the adapters' common answer in every table; no adapter may have them."""


PLACE = "<image>"
"""Marks the place of a picture in a message of a sample with pictures."""


def escape_places(text: str) -> str:
    """Text from the data, escaped for a message: an `<image>` in it must not mark the place of a picture.

    Inserts a word joiner, which has no width, after the `<`. Prompts and training get the text without the joiner.
    """
    return re.sub("<(?=\u2060*image>)", "<\u2060", text)


def unescape_places(text: str) -> str:
    """A text as it was before `escape_places`."""
    return re.sub("<\u2060(?=\u2060*image>)", "<", text)


class Message(TypedDict):
    """One message of a conversation, in the form that chat templates take: OpenAI's, with arguments as objects."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    """May be empty or missing in a message with `tool_calls`. The only text in which `<image>` marks a picture."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """Calls of tools in an assistant's message, in OpenAI's form, but with `arguments` as an object: `{"type":
    "function", "function": {"name": ..., "arguments": {...}}}`."""
    tool_call_id: NotRequired[str]
    """In a tool's message: the `id` of the call that it answers."""
    name: NotRequired[str]
    """Who speaks, such as the tool."""
    reasoning_content: NotRequired[str]
    """What an assistant thought before its answer."""


class Meta(TypedDict):
    """What the stages know about a sample besides its messages. A task with further keys extends this TypedDict."""

    group: str
    """Samples of one group, such as a document, are in the same split; intervals of scores count groups."""
    source: NotRequired[str]
    """The data set, by the name that data mixes use; preprocess sets it from the question."""
    kind: NotRequired[str]
    """Kind of the question: the report has a score for each kind."""
    question: NotRequired[str]
    """The question's own text, for the report."""
    target: NotRequired[str]
    """The completion to learn, if it is not the first reference; preprocess removes it."""
    answer: NotRequired[Message]
    """In a test sample of a conversation: the message that answers, whatever its form."""
    error: NotRequired[str]
    """Why there is no prompt for the sample, which then counts as failed."""
    trained_on: NotRequired[bool]
    """Whether a test sample is also trained on (`data.evaluate_on_training`)."""
    pages: NotRequired[list[int]]
    """Pages that the sample shows, counted from 1."""
    page_images: NotRequired[list[str]]
    """Pictures of those pages, relative to the run folder, for the report."""


class Sample(TypedDict):
    """One record to learn from or to answer."""

    id: str
    messages: list[Message]
    """The conversation. In train and validation it ends with the assistant's answer; in test it does not. Empty for
    plain text."""
    tools: NotRequired[list[dict[str, Any]]]
    """Tools that the assistant may call, in OpenAI's form, for the chat template."""
    text: NotRequired[str]
    """Plain text without roles: training learns all of it. A model is asked nothing about it, only its loss counts."""
    images: list[str]
    """Paths relative to the run folder, one for each `<image>` in the messages. Without any, `<image>` is text."""
    references: list[str]
    """Every answer that counts as right."""
    meta: Meta


class Prediction(TypedDict):
    """One model's answer to a sample."""

    id: str
    answer: str | None
    """The answer that the task read out of the text; None if the sample failed."""
    text: str | None
    """The completion of the last pass, as generated; None if the sample failed. For a vote: its answer."""
    finish_reason: str | None
    """`stop`, or `length` when max_new_tokens cut it off."""
    prompt_tokens: int
    """Tokens of the prompts of all passes, with those of pictures."""
    completion_tokens: int
    error: str | None
    """Why the sample failed; None if it did not."""
    passes: dict[str, str]
    """Completions of the earlier passes, by the pass's name."""


def failed_prediction(sample_id: str, error: str, prompt_tokens: int = 0) -> Prediction:
    """The prediction of a failed sample: no answer, and `error` as the reason.

    `prompt_tokens` is the number of tokens in the prompts of all passes.
    """
    return {
        "id": sample_id,
        "answer": None,
        "text": None,
        "finish_reason": None,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 0,
        "error": error,
        "passes": {},
    }


def is_asked(sample: Sample) -> bool:
    """Whether a test sample is a prompt that models complete. Without messages, only the loss of its text counts."""
    return bool(sample["messages"])


def is_empty(prediction: Prediction | None) -> bool:
    """Whether a prediction has an answer without text."""
    return prediction is not None and prediction["answer"] is not None and not prediction["answer"].strip()
