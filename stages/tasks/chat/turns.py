"""The order of turns: what a conversation must look like to be learnt from, and what is done if it does not.

Chat templates want an optional system prompt, then a question, and answers that follow questions or a tool's response.
FastChat leaves out what is before the first question, and so does Lorry. Turns of one role in a row are joined by a
blank line, what follows the last answer is left out, and a conversation with another fault is skipped.
"""

from collections.abc import Sequence
from dataclasses import replace

from stages.contract.records import PLACE, Message, escape_places
from stages.tasks.chat.forms import NEXT, Conversation, Picture, Turn
from stages.tasks.common.json_lines import BadRecordError

JOINED = "turns of one role in a row, joined by a blank line"
UNASKED = "turns before the first question, left out"
UNANSWERED = "turns after the last answer, left out"
PLACED = "pictures without a place, put before the first question"
"""Notes about a conversation: what was done to it."""

NO_ANSWER = "no answer"
"""Why a conversation without an answer is skipped."""
BLANK_LINE = "\n\n"


def ordered_turns(turns: Sequence[Turn]) -> tuple[list[Turn], list[str]]:
    """The turns that are learnt from, and notes on what was done to them. Raises BadRecordError if they are
    unusable."""
    notes = []
    count = next((place for place, turn in enumerate(turns) if turn.role != "system"), len(turns))
    system, said = list(turns[:count]), list(turns[count:])
    if any(turn.role == "system" for turn in said):
        raise BadRecordError("a system prompt after the first turn")
    first = next((place for place, turn in enumerate(said) if turn.role == "user"), None)
    if first is None:
        raise BadRecordError("no question", f"found the roles {', '.join(turn.role for turn in turns)}"[:100])
    if first:
        notes.append(UNASKED)
    last = max((place for place, one in enumerate(said) if one.role == "assistant" and not one.is_empty), default=-1)
    if last < first:
        raise BadRecordError(NO_ANSWER)
    if last < len(said) - 1:
        notes.append(UNANSWERED)
    said = said[first : last + 1]
    for place, turn in enumerate(said, start=first + count + 1):
        if turn.is_empty and turn.role != "tool":  # a tool may return nothing
            raise BadRecordError("empty turn", f"turn {place}, from {turn.role}")
    found: list[Turn] = []
    for turn in [*system, *said]:
        before = found[-1] if found else None
        if before is not None and before.role == turn.role != "tool":
            if before.has_text and turn.has_text:
                notes.append(JOINED)
            found[-1] = _joined(before, turn)
        elif turn.role == "tool" and (before is None or before.role not in ("assistant", "tool")):
            raise BadRecordError("a tool's response without a call")
        else:
            found.append(turn)
    return found, list(dict.fromkeys(notes))


def _joined(before: Turn, turn: Turn) -> Turn:
    """Two turns of one role as one. Raises BadRecordError if they cannot be one."""
    if before.tool_calls and turn.has_text:
        raise BadRecordError("a tool call without a response")
    if turn.more or before.more.keys() - {"reasoning_content"}:
        raise BadRecordError("turns of one role in a row that cannot be joined", f"role {turn.role}")
    between = (BLANK_LINE,) if before.has_text and turn.has_text else ()
    return replace(
        before, parts=(*before.parts, *between, *turn.parts), tool_calls=(*before.tool_calls, *turn.tool_calls)
    )


def place_pictures(turns: Sequence[Turn], own: Sequence[Picture]) -> tuple[list[Turn], list[Picture], list[str]]:
    """The turns with a picture at each place of one, all pictures in order, and notes.

    `own` is the record's own list of pictures. Its places are the parts that are pictures without a path, else
    `<image>` in turns that are no answers, else the start of the first question. Raises BadRecordError if there is not
    one place for each picture, or a picture in an answer.
    """
    notes = []
    shown = [part for turn in turns for part in turn.parts if isinstance(part, Picture)]
    if own and not shown:
        turns = [turn if turn.role == "assistant" else _with_places(turn) for turn in turns]
        if not any(part is NEXT for turn in turns for part in turn.parts):
            notes.append(PLACED)
            first = next(place for place, turn in enumerate(turns) if turn.role == "user")
            asked = replace(turns[first], parts=(*[NEXT] * len(own), *turns[first].parts))
            turns = [*turns[:first], asked, *turns[first + 1 :]]
        shown = [part for turn in turns for part in turn.parts if isinstance(part, Picture)]
    if any(isinstance(part, Picture) for turn in turns if turn.role == "assistant" for part in turn.parts):
        raise BadRecordError("a picture in an answer")
    places = sum(picture is NEXT for picture in shown)
    if places != len(own):
        raise BadRecordError("not one <image> for each picture", f"found {places} for {len(own)} pictures")
    left = iter(own)
    return list(turns), [next(left) if picture is NEXT else picture for picture in shown], notes


def _with_places(turn: Turn) -> Turn:
    """A turn of texts, with a picture in place of each `<image>`."""
    parts: list[str | Picture] = []
    for place, text in enumerate(_text_of(turn).split(PLACE)):
        parts += [NEXT, text] if place else [text]
    return replace(turn, parts=tuple(parts))


def _text_of(turn: Turn) -> str:
    """The text of a turn without pictures."""
    return "".join(part for part in turn.parts if isinstance(part, str))


def message_of(turn: Turn) -> Message:
    """The turn as a sample has it."""
    texts = [""]
    for part in turn.parts:
        if isinstance(part, Picture):
            texts.append("")
        else:
            texts[-1] += part
    message: Message = {"role": turn.role, "content": PLACE.join(map(escape_places, texts))}
    if turn.tool_calls:
        message["tool_calls"] = list(turn.tool_calls)
    message.update(turn.more)  # type: ignore[typeddict-item]
    return message


def conversation_messages(conversation: Conversation) -> tuple[list[Message], list[Picture], list[str]]:
    """A conversation's messages, its pictures in order, and notes on what was done to it. Raises BadRecordError if it
    is unusable."""
    turns, notes = ordered_turns(conversation.turns)
    turns, pictures, more = place_pictures(turns, conversation.pictures)
    return [message_of(turn) for turn in turns], pictures, [*conversation.notes, *notes, *more]
