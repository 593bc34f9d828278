"""Conversations about pictures in three forms, with lossless conversions between them.

LLaVA's form (haotian-liu/LLaVA, docs/Finetune_Custom_Data.md). `image` is a list for several pictures, and missing for
none:

    {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A bus."}]}

Data-Juicer's form, as its tools/fmt_conversion/multimodal write it: with all turns, or, for pretraining, with the
caption alone. The question of a caption is looked up in LLaVA's file by the record's id:

    {"id": "7", "text": "[[human]]: <__dj__image>\\nWhat is it?\\n[[gpt]]: A bus. <|__dj__eoc|>", "images": ["a.jpg"]}
    {"id": "7", "text": "<__dj__image>\\nA bus. <|__dj__eoc|>", "images": ["a.jpg"]}

ms-swift's form, the messages: `user` and `assistant` for `human` and `gpt`, and `<image>` in place of a picture. White
space is never changed. A conversation that a form cannot express is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.contract.records import PLACE, Message
from stages.tasks.common.json_lines import BadRecordError, found_keys, is_given, text_or_number

DJ_PLACE, DJ_END = "<__dj__image>", "<|__dj__eoc|>"
"""Data-Juicer's marks of a picture and of the end of a chunk."""

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
"""Roles of messages by LLaVA's speakers."""
_SPEAKERS = {role: speaker for speaker, role in ROLES.items()}
_MARK = re.compile(r"\[\[[a-zA-Z]*\]\]: ")
_TURN = re.compile(r"(?:\A\s*|\n)\[\[(system|human|gpt)\]\]: ")

Llava = dict[str, Any]
DataJuicer = dict[str, Any]


@dataclass(frozen=True)
class Original:
    """The part of a LLaVA record that a caption in Data-Juicer's form lacks."""

    id: str | int
    """As in LLaVA's file; Data-Juicer's records have it as text."""
    question: str


# -- messages ----------------------------------------------------------------------------------------------------


def to_messages(record: Llava) -> tuple[list[Message], list[str]]:
    """A LLaVA record's messages, and the names of its pictures, one for each `<image>` outside the answers.

    Raises BadRecordError if turns or pictures have another form, if the turns do not alternate and end with an answer,
    if a turn is empty, or if the number of `<image>` outside the answers is not the number of pictures.
    """
    turns, pictures = turns_of(record), pictures_of(record)
    speakers = [speaker for speaker, _ in turns]
    spoken = speakers[1:] if speakers[0] == "system" else speakers
    if not spoken or spoken != ["human", "gpt"] * (len(spoken) // 2):
        raise BadRecordError("turns are not pairs of human and gpt", ", ".join(speakers)[:100])
    for place, (speaker, value) in enumerate(turns, start=1):
        if not value.strip():
            raise BadRecordError("empty turn", f"turn {place}, from {speaker}")
    places = sum(value.count(PLACE) for speaker, value in turns if speaker != "gpt")
    if places != len(pictures):
        raise BadRecordError("not one <image> for each picture", f"found {places} for {len(pictures)} pictures")
    return [{"role": ROLES[speaker], "content": value} for speaker, value in turns], pictures


def from_messages(name: str | int, messages: list[Message], pictures: list[str]) -> Llava:
    """The LLaVA record with the id `name`, made from messages and the names of their pictures."""
    turns = [(_SPEAKERS[message["role"]], message["content"]) for message in messages]
    return _llava_record(name, turns, pictures)


def _llava_record(name: str | int, turns: list[tuple[str, str]], pictures: list[str]) -> Llava:
    """The LLaVA record with this id, these turns (speaker and text) and these pictures."""
    shown = {"image": pictures[0] if len(pictures) == 1 else pictures} if pictures else {}
    return {"id": name, **shown, "conversations": [{"from": who, "value": value} for who, value in turns]}


def id_of(record: Mapping[str, Any]) -> str | int:
    """A record's id. Raises BadRecordError if it is neither a non-empty string nor an integer."""
    name = record.get("id")
    if type(name) is int or (isinstance(name, str) and name.strip()):
        return name
    raise BadRecordError("no id", repr(name)[:100] if is_given(name) else found_keys(record))


def turns_of(record: Llava) -> list[tuple[str, str]]:
    """The turns of a LLaVA record, each with speaker and text. An answer that is a number becomes text. Raises
    BadRecordError for any other form."""
    found = record.get("conversations")
    if not isinstance(found, list) or not found:
        raise BadRecordError("no conversations", repr(found)[:100] if is_given(found) else found_keys(record))
    turns = []
    for turn in found:
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker == "gpt":
            value = text_or_number(value)
        if not isinstance(speaker, str) or speaker not in ROLES or not isinstance(value, str):
            raise BadRecordError("a turn lacks a `from` (system, human or gpt) or a text as `value`", repr(turn)[:100])
        turns.append((speaker, value))
    return turns


def pictures_of(record: Llava) -> list[str]:
    """The names of a LLaVA record's pictures; empty without `image`. Raises BadRecordError unless `image` is a name or
    a list of names."""
    found = record.get("image")
    return _list_of_names([found] if isinstance(found, str) else found)


def _list_of_names(value: Any) -> list[str]:
    """The names in a list, without missing names (`is_given`); empty if the list itself is missing. Raises
    BadRecordError for another value."""
    given = value if is_given(value) else []
    if not isinstance(given, list) or not all(isinstance(name, str) for name in filter(is_given, given)):
        raise BadRecordError("pictures are not a list of names", repr(value)[:100])
    return list(filter(is_given, given))


# -- Data-Juicer -------------------------------------------------------------------------------------------------


def to_dj(record: Llava) -> DataJuicer:
    """The Data-Juicer record with all turns of a LLaVA record.

    Raises BadRecordError if the id, the turns or the pictures are unusable, or if a turn contains one of Data-Juicer's
    marks of a turn, a picture or an end.
    """
    turns = turns_of(record)
    text = "\n".join(f"[[{speaker}]]: {_dj_text(value)}" for speaker, value in turns)
    return {"id": str(id_of(record)), "text": f"{text} {DJ_END}", "images": pictures_of(record)}


def to_dj_caption(record: Llava) -> DataJuicer:
    """The Data-Juicer record with only the answer of a LLaVA record. Raises BadRecordError if the record is unusable,
    if its turns are not one question and one answer, or if the answer contains `<image>` or one of Data-Juicer's
    marks."""
    turns, pictures = turns_of(record), pictures_of(record)
    if [speaker for speaker, _ in turns] != ["human", "gpt"]:
        raise BadRecordError("not one question and one answer", f"found {len(turns)} turns")
    if PLACE in turns[1][1]:
        raise BadRecordError("an answer contains <image>", turns[1][1][:100])
    text = f"{DJ_PLACE}\n" * len(pictures) + f"{_dj_text(turns[1][1])} {DJ_END}"
    return {"id": str(id_of(record)), "text": text, "images": pictures}


def _dj_text(value: str) -> str:
    """The text of a turn in Data-Juicer's form. Raises BadRecordError if it contains one of Data-Juicer's marks."""
    mark = _MARK.search(f"{value} ")  # a blank follows, as before the end mark
    taken = mark.group() if mark else next((mark for mark in (DJ_PLACE, DJ_END) if mark in value), None)
    if taken is not None:
        raise BadRecordError("a turn contains a Data-Juicer mark", taken)
    return value.replace(PLACE, DJ_PLACE)


def has_turns(record: DataJuicer) -> bool:
    """Whether a Data-Juicer record has all turns, not only a caption: whether its text begins with the mark of a turn.
    Raises BadRecordError if the text is not a string."""
    return _TURN.match(text_of_dj(record)) is not None


def text_of_dj(record: DataJuicer) -> str:
    """The text of a Data-Juicer record. Raises BadRecordError if it is not a string."""
    text = record.get("text")
    if not isinstance(text, str):
        raise BadRecordError("text is not a string", repr(text)[:100])
    return text


def from_dj(record: DataJuicer, name: str | int | None = None) -> Llava:
    """The LLaVA record of a Data-Juicer record with all turns. `name` is its id in LLaVA's file, if known.

    Raises BadRecordError if the text does not begin with a turn, or if the id or the pictures are unusable.
    """
    pieces = _TURN.split(text_of_dj(record))
    if len(pieces) < 3 or pieces[0].strip():
        raise BadRecordError("no [[human]]: and [[gpt]]: in the text", pieces[0][:100])
    speakers, values = pieces[1::2], [_without_end(value).replace(DJ_PLACE, PLACE) for value in pieces[2::2]]
    turns = list(zip(speakers, values, strict=True))
    return _llava_record(id_of(record) if name is None else name, turns, _pictures(record, turns))


def restored_record(record: DataJuicer, originals: Mapping[str, Original | None]) -> Llava:
    """The LLaVA record of a caption, with the question from LLaVA's file.

    The question is found by the record's id; for a caption that Data-Juicer added, by its `original_id`. `originals`
    are by id as text; None if records with the same id have different questions. Raises BadRecordError if there is no
    question or more than one, or if the record's id, text or pictures are unusable.
    """
    name = id_of({"id": record["original_id"]} if is_given(record.get("original_id")) else record)
    if str(name) not in originals:
        raise BadRecordError("no question with its id in the LLaVA file", str(name))
    original = originals[str(name)]
    if original is None:
        raise BadRecordError("several questions with its id in the LLaVA file", str(name))
    turns = [("human", original.question), ("gpt", caption_in(text_of_dj(record)))]
    return _llava_record(original.id, turns, _pictures(record, turns))


def _pictures(record: DataJuicer, turns: list[tuple[str, str]]) -> list[str]:
    """The names of a record's pictures. Operators that add a caption repeat names, so each counts once if that gives
    one picture for each `<image>`. Raises BadRecordError if they are not a list of names."""
    pictures = _list_of_names(record.get("images"))
    once = list(dict.fromkeys(pictures))
    places = sum(value.count(PLACE) for speaker, value in turns if speaker != "gpt")
    return once if len(once) == places else pictures


def caption_in(text: str) -> str:
    """The caption in a Data-Juicer text, without the marks of pictures and end.

    A mark at the start or end is removed with the white space outside it and one blank or line end inside it. Marks
    further inside separate chunks, which become lines.
    """
    place = DJ_PLACE if DJ_PLACE in text else PLACE
    caption = _without_end(text)
    while caption.lstrip().startswith(place):
        caption = caption.lstrip().removeprefix(place)
        caption = caption[1:] if caption[:1] in ("\n", " ") else caption
    while caption.rstrip().endswith(place):
        caption = caption.rstrip().removesuffix(place)
        caption = caption[:-1] if caption[-1:] in ("\n", " ") else caption
    if DJ_END not in caption and place not in caption:
        return caption
    chunks = re.split(f"{re.escape(DJ_END)}|{re.escape(place)}", caption)
    return "\n".join(chunk.strip() for chunk in chunks if chunk.strip())


def _without_end(text: str) -> str:
    """The text without Data-Juicer's mark of the end and one blank before it; unchanged if it does not end with one."""
    if not text.rstrip().endswith(DJ_END):
        return text
    return text.rstrip().removesuffix(DJ_END).removesuffix(" ")
