"""Reads a completion of a reasoning model: its answer is what follows the reasoning."""

import re

from stages.models.reasoning import ANSWER_MARKS, CHANNEL, MARKS, MESSAGE

_FLAGS = re.DOTALL | re.IGNORECASE


def without_reasoning(text: str) -> str:
    """A completion without the reasoning of the model. A text without marks of reasoning is returned as it is.

    Closed blocks are left out. The beginning of a block may be missing, since some chat templates write it in the
    prompt: all before its end is then left out. A block that never ends has no answer: the result is empty. If the rest
    has marks around the answer, such as `<answer>`, the result is what they enclose.
    """
    rest = _final_channel(text)
    for begin, end in MARKS:
        rest = _without_blocks(rest, begin, end)
    if rest == text:
        return text
    rest = rest.strip()
    for begin, end in ANSWER_MARKS:
        found = re.search(f"{re.escape(begin)}(.*?)(?:{re.escape(end)}|$)", rest, _FLAGS)
        rest = found[1].strip() if found else rest
    return rest


def _without_blocks(text: str, begin: str, end: str) -> str:
    """The text without blocks of reasoning between these marks; empty if one never ends."""
    begin, end = re.escape(begin), re.escape(end)
    rest = re.sub(f"{begin}(?:(?!{begin}).)*?{end}", "", text, flags=_FLAGS)
    while rest != text:  # blocks inside others
        text, rest = rest, re.sub(f"{begin}(?:(?!{begin}).)*?{end}", "", rest, flags=_FLAGS)
    rest = re.split(end, rest, flags=_FLAGS)[-1]
    return "" if re.search(begin, rest, _FLAGS) else rest


def _final_channel(text: str) -> str:
    """What gpt-oss writes into its channel for answers; empty if it only reasons. Other texts are returned as they are.

    Without its special tokens, the text is `analysis...assistantfinal...`.
    """
    if CHANNEL in text:
        channels = re.findall(rf"{re.escape(CHANNEL)}\s*(\w+).*?{re.escape(MESSAGE)}(.*?)(?=<\||\Z)", text, _FLAGS)
        answers = [content for name, content in channels if name == "final"]
        return answers[-1] if answers else ""
    found = re.match(r"\s*analysis.*?assistantfinal(.*)", text, _FLAGS)
    return found[1] if found else text
