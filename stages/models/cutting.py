"""Cuts a conversation that is too long between turns, from the front."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from stages.contract.records import PLACE, Message


def cut_conversation(
    messages: Sequence[Message], images: Sequence[str], fits: Callable[[list[Message], list[str]], bool]
) -> tuple[list[Message], list[str]] | None:
    """The longest end of a conversation that `fits`, with its pictures; None if not even the last exchange fits.

    It keeps the system message and begins with a user's turn. `fits` gets messages and pictures, and has to hold for
    every shorter end too.
    """
    roles = [message["role"] for message in messages]
    first = next((place for place, role in enumerate(roles) if role != "system"), len(roles))
    starts = [place for place in range(first + 1, len(roles)) if roles[place] == "user" != roles[place - 1]]

    def end_from(place: int) -> tuple[list[Message], list[str]]:
        """The conversation without the messages from the system message to a place, and its pictures."""
        lost = sum((message.get("content") or "").count(PLACE) for message in messages[first:place]) if images else 0
        return [*messages[:first], *messages[place:]], list(images[lost:])

    chosen = bisect_left(starts, True, key=lambda place: fits(*end_from(place)))
    return end_from(starts[chosen]) if chosen < len(starts) else None
