"""Looks at a user's conversations: how many, how long in tokens, whether they think or have pictures."""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from stages.contract.recipe import Recipe
from stages.contract.records import Sample
from stages.models.reasoning import MARKS
from stages.tasks import load_task

if TYPE_CHECKING:
    from stages.tasks.task import ConversationTask

COUNTED = 2000
"""Conversations whose tokens are counted, taken at even distances; and of the longest ones a hundredth of that."""

OF_A_CONVERSATION, OF_A_MESSAGE = 32, 8
"""Tokens that a chat template adds to a conversation and to each message, at most as the published ones do."""

OF_A_PICTURE = 1280
"""Tokens of a picture at most, as with the Qwen2-VL family, where 28 x 28 pixels are a token; `train.max_pixels` limits
them to that."""

BYTES_A_TOKEN = 3
"""Bytes of UTF-8 a token where the tokenizer cannot be read here: fewer than usual, so that lengths are not too low."""


@dataclass(frozen=True)
class Seen:
    """What the data are."""

    conversations: int
    """Usable ones, those of plain text too."""
    held_out: int
    """Those that the data themselves state to be for test."""
    lengths: tuple[int, ...]
    """Tokens of the counted ones, ascending."""
    longest: int
    """Tokens of the longest one."""
    answers: tuple[int, ...]
    """Tokens of the last answers of the counted ones, ascending; empty for plain text."""
    thinks: bool
    """Whether half of the conversations have thoughts, or more."""
    pictures: bool
    """Whether one shows a picture."""

    def share(self, tokens: int) -> float:
        """The share of the conversations that are not longer than so many tokens."""
        return sum(length <= tokens for length in self.lengths) / len(self.lengths)


def look_at(recipe: Recipe, data: Path, model: Path, runs: Path) -> tuple[Seen, list[str]]:
    """Read all conversations as preprocess will, and count the tokens of some of them. Returns what they are, and the
    task's sentences about them.

    Near-duplicates are not looked for, which takes longer than all else. The task stores pictures while it reads; they
    lie below `runs`, whose disk has to have room for them anyway, until this returns. Raises the errors of the task's
    `read_conversations`.
    """
    task = cast("ConversationTask", load_task(recipe.task))
    settings = {**recipe.preprocess.samples, "near_duplicates": None}
    recipe = recipe.model_copy(update={"preprocess": recipe.preprocess.model_copy(update={"samples": settings})})
    sentences: list[str] = []
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}

    def skip(what: str, reason: str, detail: str = "") -> None:
        """Count a record that cannot be used."""
        skipped[reason] += 1
        first.setdefault(reason, what)

    def say(sentence: str) -> None:
        """Keep a sentence about the data."""
        sentences.append(sentence)

    with TemporaryDirectory(prefix=".tune-", dir=runs if runs.is_dir() else None) as pictures:
        questions = task.read_conversations(recipe, data, Path(pictures), skip, say)
    sentences += [f"{number:,} skipped: {reason}, first {first[reason]}" for reason, number in skipped.items()]
    samples = [sample for question in questions for sample in task.build_samples(recipe, question, None, "train")]
    return _seen(questions, samples, model), sentences


def _seen(questions: Sequence[Any], samples: Sequence[Sample], model: Path) -> Seen:
    """What these conversations are."""
    texts = [_texts(sample) for sample in samples]
    chosen = _chosen([sum(map(len, one)) for one in texts])
    count = token_counter(model)
    contents = count([part for place in chosen for part in texts[place]])
    numbers = iter(contents)
    lengths = [
        sum(next(numbers) for _ in texts[place])
        + (OF_A_CONVERSATION if samples[place]["messages"] else 2)
        + OF_A_MESSAGE * len(samples[place]["messages"])
        + OF_A_PICTURE * len(samples[place]["images"])
        for place in chosen
    ]
    answers = count([_answer(samples[place]) for place in chosen if samples[place]["messages"]])
    even = len(chosen) - len(chosen) // 100 if len(samples) > COUNTED else len(chosen)
    return Seen(
        conversations=len(questions),
        held_out=sum(question.split in ("test", "test only") for question in questions),
        lengths=tuple(sorted(lengths[:even])),
        longest=max(lengths),
        answers=tuple(sorted(answers)),
        thinks=2 * sum(any(map(_has_thoughts, sample["messages"])) for sample in samples) >= len(samples),
        pictures=any(sample["images"] for sample in samples),
    )


def _chosen(sizes: Sequence[int]) -> list[int]:
    """The places of the conversations whose tokens are counted: at even distances, then the longest ones."""
    if len(sizes) <= COUNTED:
        return list(range(len(sizes)))
    even = [place * len(sizes) // COUNTED for place in range(COUNTED)]
    return even + sorted(range(len(sizes)), key=lambda place: -sizes[place])[: COUNTED // 99]


def token_counter(model: Path) -> Callable[[list[str]], list[int]]:
    """A function that counts the tokens of texts: by the model's tokenizer.json, or by their bytes where it has none or
    the library `tokenizers` is not installed here."""
    file = model / "tokenizer.json"
    if not file.is_file() or importlib.util.find_spec("tokenizers") is None:
        return lambda texts: [len(text.encode("utf-8", "replace")) // BYTES_A_TOKEN + 1 for text in texts]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [
        len(one.ids) for one in tokenizer.encode_batch([_encodable(text) for text in texts], add_special_tokens=False)
    ]


def _encodable(text: str) -> str:
    """A text without half surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def _texts(sample: Sample) -> list[str]:
    """The texts of a sample, one for each message, and that of its tools."""
    record: dict[str, Any] = {**sample}
    found = [str(record["text"])] if record.get("text") else []
    found += [_message_text(message) for message in sample["messages"]]
    return [*found, json.dumps(record["tools"], ensure_ascii=False)] if record.get("tools") else found


def _message_text(message: Any) -> str:
    """All that a chat template may write of a message."""
    calls = message.get("tool_calls")
    parts = (message.get("reasoning_content"), message.get("content"), calls and json.dumps(calls, ensure_ascii=False))
    return "\n".join(str(part) for part in parts if part)


def _answer(sample: Sample) -> str:
    """The text of a sample's last message."""
    return _message_text(sample["messages"][-1])


def _has_thoughts(message: Any) -> bool:
    """Whether an answer has thoughts that are not empty."""
    if message["role"] != "assistant":
        return False
    content = str(message.get("content") or "")
    inside = [content.partition(end)[0].rpartition(begin)[2] for begin, end in MARKS if end in content]
    return any(text.strip() for text in (*inside, str(message.get("reasoning_content") or "")))
