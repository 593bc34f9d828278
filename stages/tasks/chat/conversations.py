"""The conversations of the data: read from every data set, with their pictures, and grouped so that no near-duplicate
of a test conversation is trained on."""

import base64
import binascii
import hashlib
import json
import os
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from stages.contract.errors import DataError
from stages.contract.records import Message, unescape_places
from stages.tasks.chat.forms import NO_FORM, TITLES, Conversation, Form, Picture, conversation_in
from stages.tasks.chat.turns import NO_ANSWER, conversation_messages
from stages.tasks.common.data_sets import WHOLE, data_sets_in, file_of, skip_other_entries, uses_of_splits
from stages.tasks.common.groups import Groups
from stages.tasks.common.json_lines import BadRecordError, found_keys
from stages.tasks.common.pictures import Pictures, StoredPicture
from stages.tasks.common.skips import Skips
from stages.tasks.common.tables import BINARY, Row, Split, read_rows
from stages.tasks.task import Given, Say, Skip

AHEAD = 256
"""Records whose pictures are read together."""
SHOWN = 20
"""Data sets that have a sentence each; the others have one together."""
SMALL = 10
"""Conversations below which data sets are split together: each would have one for test, however few it has."""


@dataclass(frozen=True, slots=True)
class ChatQuestion:
    """A conversation, or a plain text."""

    id: str
    """Begins with the data set's name."""
    source: str
    group: str
    split: Given | None
    messages: tuple[Message, ...]
    """Ends with the assistant's answer; empty for a plain text."""
    plain: str | None = None
    """The plain text; None for a conversation."""
    tools: tuple[dict[str, Any], ...] = ()
    images: tuple[str, ...] = ()
    """File names in <run>/preprocess/pictures."""
    digests: tuple[str, ...] = ()
    """sha256 (hex) of each picture's file."""

    @property
    def text(self) -> str:
        """The last question; empty for a plain text."""
        asked = [message for message in self.messages if message["role"] == "user"]
        return unescape_places(asked[-1]["content"]) if asked else ""

    @property
    def answers(self) -> tuple[str, ...]:
        """What is learnt last: the text of the last answer, or its tool calls as JSON; or the plain text."""
        if self.plain is not None:
            return (self.plain,)
        last = self.messages[-1]
        return (unescape_places(last["content"]) or json.dumps(last.get("tool_calls"), ensure_ascii=False),)


class Reading:
    """Reads the data sets of a data path, and counts what was found in each."""

    def __init__(self, path: Path, pictures: Path, form: Form | None, columns: Mapping[str, str], skip: Skip) -> None:
        self._path, self._form, self._columns, self._skip = path, form, columns, Skips(skip)
        self._root = path if path.is_dir() else path.parent
        self._pictures = Pictures(self._root, pictures, pad=False)
        self._forms: Counter[Form] = Counter()
        self._skipped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()

    def questions(self, say: Say) -> list[ChatQuestion]:
        """The usable conversations, in the order of the data sets' names, each with its own group if it has one, else
        none. Raises DataError if none is usable."""
        data_sets = data_sets_in(self._path)
        skip_other_entries(self._path, data_sets, self._skip)
        found: list[ChatQuestion] = []
        for place, name in enumerate(sorted(data_sets)):
            if place <= SHOWN:
                self._forms, self._skipped, self._notes = Counter(), Counter(), Counter()
            found += self._data_set(name, data_sets[name])
            if place < SHOWN:
                say(self._summary(self._path.name if name == WHOLE else data_sets[name].name))
        if len(data_sets) > SHOWN:
            say(self._summary(f"{len(data_sets) - SHOWN:,} other data sets"))
        if not found:
            hint = "; name the columns that hold the turns in preprocess.samples.columns"
            names = ", ".join(sorted(data_sets))
            raise DataError(
                f"{self._path}: no usable conversation in {names}; {self._skip.why}"
                f"{hint if self._skip.most_common in (NO_FORM, NO_ANSWER) else ''}"
            )
        return found

    def _summary(self, name: str) -> str:
        """What was found in a data set, as a sentence."""
        counts = self._forms.most_common()
        total = sum(self._forms.values())
        unit = "texts" if set(self._forms) == {"text"} else "conversations"
        forms = ", ".join(f"{TITLES[form]}{f' ({count:,})' if len(counts) > 1 else ''}" for form, count in counts)
        unanswered = self._skipped.pop(NO_ANSWER, 0)
        parts = [forms or "no known form", f"{total:,} {unit if total != 1 else unit[:-1]}"]
        parts += [f"{unanswered:,} without an answer"] if unanswered else []
        parts += [f"{self._skipped.total():,} unusable"] if self._skipped else []
        notes = [f"{count:,} with {note}" for note, count in self._notes.items()]
        return "; ".join([f"{name}: {', '.join(parts)}", *notes])

    def _data_set(self, source: str, path: Path) -> list[ChatQuestion]:
        """The usable conversations of one data set."""
        found: dict[str, ChatQuestion] = {}
        stated: dict[str, Split | None] = {}
        for row, parsed in self._parsed_rows(path):
            try:
                if isinstance(parsed, BadRecordError):
                    raise parsed
                conversation, messages, pictures = parsed
                stored = [self._stored(picture, path.parent / row.file) for picture in pictures]
            except BadRecordError as error:
                self._skipped[error.reason] += 1
                self._skip(row.where, error.reason, str(error))
                continue
            file = file_of(row, path)
            key = f"{source}/{conversation.id or f'{file}-{row.place}'}"
            if key in found:  # ids of each file may start at 1, and parts of a conversation may have one id
                key = f"{source}/{file}-{row.place}"
            while key in found:
                key += "+"
            stated[key] = row.split
            found[key] = ChatQuestion(
                id=key,
                source=source,
                group=conversation.group and f"{source}/{conversation.group}",
                split=None,
                messages=tuple(messages),
                plain=conversation.text,
                tools=conversation.tools,
                images=tuple(picture.name for picture in stored),
                digests=tuple(picture.digest for picture in stored),
            )
            self._forms[conversation.form] += 1
        splits = uses_of_splits({split for split in stated.values() if split})
        return [replace(one, split=splits.get(stated[key])) for key, one in found.items()]  # type: ignore[arg-type]

    def _parsed_rows(
        self, path: Path
    ) -> Iterator[tuple[Row, tuple[Conversation, list[Message], list[Picture]] | BadRecordError]]:
        """The rows of a data set, each with its conversation, messages and pictures, or the record's error. Stores the
        pictures of a batch of records before it yields the first of them."""
        rows = read_rows(path)
        while batch := list(islice(rows, AHEAD)):
            parsed = [self._parsed(row) for row in batch]
            self._pictures.fetch(
                self._named(picture.name, path.parent / row.file)
                for row, one in zip(batch, parsed, strict=True)
                if not isinstance(one, BadRecordError)
                for picture in one[2]
                if picture.content is None and ":" not in picture.name
            )
            yield from zip(batch, parsed, strict=True)

    def _parsed(self, row: Row) -> tuple[Conversation, list[Message], list[Picture]] | BadRecordError:
        """A row's conversation, with its messages and pictures, or the error that makes it unusable."""
        if row.bad is not None:
            return BadRecordError(*row.bad)
        try:
            binary = row.file.lower().endswith(BINARY)
            conversation = conversation_in(row.record, self._form, self._columns, binary)
            if conversation.text is not None:
                if not conversation.text.strip():
                    raise BadRecordError("empty text")
                return conversation, [], []
            messages, pictures, notes = conversation_messages(conversation)
        except BadRecordError as error:
            # an answer under another name is seen by the keys
            unnamed = error.reason == NO_ANSWER and not str(error)
            return BadRecordError(NO_ANSWER, found_keys(row.record)) if unnamed else error
        self._notes.update(notes)
        return conversation, messages, pictures

    # -- pictures --------------------------------------------------------------------------------------------------

    def _stored(self, picture: Picture, file: Path) -> StoredPicture:
        """A picture that a file of data names, stored in the run. Raises BadRecordError if it cannot be read."""
        if picture.content is not None:
            return self._pictures.of_bytes(picture.content, picture.name)
        scheme, colon, rest = picture.name.partition(":")
        if colon and scheme.lower() == "data":
            return self._pictures.of_bytes(_data_of(rest), f"{picture.name[:40]}...")
        if colon and scheme.lower() in ("http", "https"):
            raise BadRecordError("a picture on the network; download it and name the file", picture.name[:200])
        return self._pictures.of_file(self._named(picture.name, file))

    def _named(self, name: str, file: Path) -> str:
        """The path of a picture relative to the data folder, if it is below it: relative to the folder of the file
        that names it if there is such a picture, else to the data folder."""
        if name.lower().startswith("file://"):
            name = urllib.parse.unquote(urllib.parse.urlsplit(name).path)
        beside = os.path.normpath(file.parent.relative_to(self._root) / name)
        # Path.is_file raises an error for a name that is too long
        return beside if os.path.isfile(self._root / beside) else name  # noqa: PTH113


def _data_of(rest: str) -> bytes:
    """The content of a data: URI, without `data:`. Raises BadRecordError if it is not base64."""
    kind, _, content = rest.partition(",")
    try:
        if not kind.endswith(";base64"):
            raise ValueError(f"found {kind[:40]!r}")
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error) as error:
        raise BadRecordError("a data: URI that is not base64", str(error)) from error


def with_small_sets_together(questions: Sequence[ChatQuestion], named: Collection[str]) -> list[ChatQuestion]:
    """The conversations, with those of small data sets as one data set, such as files with one conversation each.

    A data set that a data mix names (`named`) or that states splits stays by itself.
    """
    counts = Counter(question.source for question in questions)
    apart = {*named, *(question.source for question in questions if question.split is not None)}
    small = {source for source, count in counts.items() if count < SMALL and source not in apart}
    if len(small) < 2:
        return list(questions)
    return [replace(question, source=WHOLE) if question.source in small else question for question in questions]


# -- groups ------------------------------------------------------------------------------------------------------


def grouped_questions(questions: Sequence[ChatQuestion], similarity: float | None, say: Say) -> list[ChatQuestion]:
    """The conversations with their final groups.

    One group are: conversations that are the same but for case, width and white space; those whose prompts are the
    same; near-duplicates, whose texts have the share `similarity` in common (None: not looked for); those with the same
    picture; and those of one data set that state the same group. A prompt or picture that a large part of all
    conversations has does not count, as for "Tell me a joke."
    """
    groups = Groups()
    names: list[str] = []
    prompts: list[list[str]] = []
    most = min(max(len(questions) / 100, 10), len(questions) / 2)
    near = _near_duplicates(questions) if similarity is not None else None
    originals: dict[str, int] = {}
    for place, question in enumerate(questions):
        whole, prompt = _normal_texts(question)
        names.append(f"conversation-{_digest(whole, *question.digests)}")
        prompts.append([f"prompt-{_digest(prompt, *question.digests)}"] if prompt else [])
        if near is not None and originals.setdefault(names[-1], place) == place:
            near.add(whole)
    _join_shared(groups, names, prompts, most)
    if near is not None:
        order = list(originals)
        for one, other in near.pairs(similarity or 1, most):
            groups.join(order[one], order[other])
    _say_duplicates(questions, [groups.name_of(name) for name in names], say)
    _join_shared(groups, names, [[f"picture-{one[:16]}" for one in question.digests] for question in questions], most)
    for question, name in zip(questions, names, strict=True):
        if question.group:
            groups.join(name, question.group)
    return [replace(question, group=groups.name_of(name)) for question, name in zip(questions, names, strict=True)]


def _join_shared(groups: Groups, names: Sequence[str], keys: Sequence[Sequence[str]], most: float) -> None:
    """Join the conversations that share a key, unless more than `most` have it."""
    counts = Counter(key for some in keys for key in set(some))
    for name, some in zip(names, keys, strict=True):
        for key in some:
            if 1 < counts[key] <= most:
                groups.join(name, key)


def _near_duplicates(questions: Sequence[ChatQuestion]) -> Any:
    """An empty NearDuplicates for these conversations."""
    from stages.tasks.chat.near_duplicates import NearDuplicates

    sizes = (
        len(question.plain or "") + sum(len(one["content"]) for one in question.messages) for question in questions
    )
    return NearDuplicates(sum(sizes))


def _normal_texts(question: ChatQuestion) -> tuple[str, str]:
    """All that is said in a conversation, and all of that before its last answer that the assistant did not say; empty
    for a plain text. Case, width and white space do not count."""
    if question.plain is not None:
        return _normal(question.plain), ""
    said = [(message["role"], _normal(_said(message))) for message in question.messages]
    return "\n".join(text for _, text in said), "\n".join(text for role, text in said if role != "assistant")


def _said(message: Message) -> str:
    """The content of a message, with its tool calls as JSON."""
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _normal(text: str) -> str:
    """A text without differences of case, width and white space."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def _digest(*texts: str) -> str:
    """The first 16 hex digits of the sha256 of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _say_duplicates(questions: Sequence[ChatQuestion], names: Sequence[str], say: Say) -> None:
    """Say how many conversations are duplicates of others, and how many of them the stated splits would train on and
    test on."""
    counts = Counter(names)
    several = [name for name, count in counts.items() if count > 1]
    if not several:
        return
    tested = {name for question, name in zip(questions, names, strict=True) if question.split == "test"}
    lost = sum(question.split == "train" and name in tested for question, name in zip(questions, names, strict=True))
    total = sum(counts[name] for name in several)
    groups = f"{len(several):,} group{'s' if len(several) > 1 else ''}"
    line = f"{total:,} of {len(questions):,} conversations have the prompt or nearly the text of others, in {groups}"
    if lost:
        line += f"; {lost:,} of them, given for training, {'is' if lost == 1 else 'are'} like test conversations"
    say(f"{line}; no group is on both sides of a split")
