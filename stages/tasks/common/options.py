"""The options of a question as data have them, and the letter of the right one."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from stages.tasks.common.json_lines import BadRecordError, is_given, text_or_number

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Letters of options, in order."""

_OPENING, _CLOSING = r"[(\[{<【〔「『《“‘\"'*\s]*", r"[)\]}>】〕」』》”’\"'*.:,;、。\s]*"
_CALLED = r"(?:(?:option|choice|answer|选项|答案)(?:\s+is|是|为)?[\s:_]*)?"
_LABEL = re.compile(rf"{_OPENING}{_CALLED}{_OPENING}([a-z]|\d{{1,2}}){_CLOSING}(?:选?项)?", re.IGNORECASE)
"""A label alone, after NFKC: `A`, `(A)`, `A.`, `A)`, `A、`, `【A】`, `Option A`, `1`, `(1)`."""
_LABELLED = re.compile(
    r"[(\[（【\s]*([A-Za-zＡ-Ｚａ-ｚ])\s*[)\]）】.．:：,，、][)\]）】.．:：,，、\s]*(\S.*)", re.DOTALL
)
"""A letter and the text after it: `A. red`, `(A) red`, `A、红`."""


def options_of(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts of options without letters before them, and the labels that the data give the options. Without labels
    in the data, the second tuple is empty.

    `value` is a list of texts or numbers, with or without letters before them, or an object of texts or numbers by
    label: `{"A": "red", "B": "blue"}`, or `{"label": ["A", "B"], "text": ["red", "blue"]}`. After the second option,
    null and empty options at the end are left out. Raises BadRecordError for anything else.
    """
    labels: tuple[str, ...] = ()
    values = value
    if isinstance(value, dict) and all(isinstance(value.get(key), list) for key in ("label", "text")):
        value = dict(zip(value["label"], value["text"], strict=False))
    if isinstance(value, dict):
        found = {label: value[key] for key in value if (label := _label_in(str(key))) is not None}
        labels = tuple(sorted(found, key=lambda label: (len(label), label)))
        values = [found[label] for label in labels] if len(found) == len(value) else None
    texts = [text_or_number(one) if is_given(one) else "" for one in values] if isinstance(values, list) else [None]
    while len(texts) > 2 and texts[-1] == "":
        texts.pop()
    labels = labels[: len(texts)]
    whole = tuple(text.strip() for text in texts if text)
    if len(whole) < len(texts) or not _follow_each_other(labels):
        raise BadRecordError("options are not a list of non-empty strings", repr(value)[:100])
    return _without_letters(whole), labels


def _label_in(text: str) -> str | None:
    """The label that is all of a text, apart from brackets, punctuation and words such as `option`: a capital letter or
    a number. None without one."""
    found = _LABEL.fullmatch(unicodedata.normalize("NFKC", text).strip())
    return found[1].upper() if found else None


def _follow_each_other(labels: tuple[str, ...]) -> bool:
    """Whether labels are A, B, C..., or consecutive numbers from 0 or 1; True if there are no labels."""
    numbers = tuple(str(number) for number in range(len(labels) + 1))
    return labels in (tuple(LETTERS[: len(labels)]), numbers[:-1], numbers[1:]) or not labels


def _without_letters(options: tuple[str, ...]) -> tuple[str, ...]:
    """The options without the letters A, B, C... before them, because prompts add letters; unchanged if one has
    none."""
    found = [_LABELLED.fullmatch(option) for option in options]
    letters = "".join(unicodedata.normalize("NFKC", match[1]).upper() for match in found if match)
    return tuple(match[2] for match in found if match) if letters == LETTERS[: len(options)] else options


def first_index(answers: Iterable[tuple[Any, int]]) -> int:
    """The number of the first option, 0 or 1, in a file with numbers as answers; 0 if both fit.

    `answers` has each answer and how many options its question has.
    """
    numbers = [(int(label), count) for answer, count in answers if (label := _number_in(answer)) is not None]
    return int(any(number == count for number, count in numbers) and all(number for number, _ in numbers))


def _number_in(answer: Any) -> str | None:
    """The number that is all of an answer, as text, apart from what `_label_in` ignores; None for any other answer."""
    label = _label_of(answer)
    return label if label is not None and label.isdecimal() else None


def _label_of(answer: Any) -> str | None:
    """The label that is all of an answer; None without one. A float with a zero fraction counts as an integer."""
    text = _text(answer) or ""
    return _label_in(re.sub(r"(?<=\d)\.0+", "", text.strip()) if isinstance(answer, float) else text)


def _text(answer: Any) -> str | None:
    """The text of an answer, or of the only answer in a list; None if it is neither a text nor a number."""
    return text_or_number(answer[0] if isinstance(answer, list) and len(answer) == 1 else answer)


def letter_of(answer: Any, options: tuple[str, ...], labels: tuple[str, ...] = (), first: int = 0) -> str | None:
    """The letter for an answer in the data; None if the answer is not given.

    An answer is a letter (`B`, `b`, `(B)`, `B.`, `B、`, full width), a letter with its option's text, an option's text,
    one of the labels that the data give the options, or a number that counts the options from `first`. If an
    option's text is a number, the text decides. Raises BadRecordError for an answer that fits no option, or several.
    """
    if not is_given(answer):
        return None
    text = _text(answer)
    if text is None:
        raise BadRecordError("answer is not a string", repr(answer)[:100])
    folded = unicodedata.normalize("NFKC", text).strip()
    valid = LETTERS[: len(options)]
    if len(folded) == 1 and folded in valid:
        return folded  # a capital letter is the documented form, whatever the options' texts
    meant = {valid[place] for place, option in enumerate(options) if _is_same_text(option, folded)}
    label = _label_of(answer)
    if label is not None and label in labels:
        meant.add(valid[labels.index(label)])
    elif label is not None and label in valid:
        meant.add(label)
    elif label is not None and label.isdecimal() and not meant and first <= int(label) < first + len(options):
        meant.add(valid[int(label) - first])
    led = _LABELLED.fullmatch(folded)
    if led is not None and led[1].upper() in valid and _is_same_text(options[valid.index(led[1].upper())], led[2]):
        meant.add(led[1].upper())
    if len(meant) != 1:
        raise BadRecordError("ambiguous answer" if meant else "answer is not an option", text[:100])
    return meant.pop()


def _is_same_text(option: str, answer: str) -> bool:
    """Whether an option and an answer, which is in NFKC already, differ at most in width, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", option).split()).casefold() == " ".join(answer.split()).casefold()
