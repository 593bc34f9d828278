"""Fits text into the columns of a terminal, of which a Chinese character takes two."""

import os
import unicodedata
from typing import IO


def terminal_width(file: IO[str]) -> int | None:
    """The number of columns of the terminal that `file` writes to, 80 if it does not say; None if it is no terminal."""
    if not file.isatty():
        return None
    try:
        return os.get_terminal_size(file.fileno()).columns or 80
    except OSError:
        return 80


def text_width(text: str) -> int:
    """The number of columns that a line of text takes."""
    return sum(map(_character_width, text))


def _character_width(character: str) -> int:
    """The number of columns that a character takes: 2 for wide ones, 0 for those that combine with the one before."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut_text(text: str, width: int) -> str:
    """The text, or its beginning with an ellipsis if it takes more than `width` columns."""
    if text_width(text) <= width:
        return text
    kept, left = "", width - 1
    for character in text:
        left -= _character_width(character)
        if left < 0:
            break
        kept += character
    return kept + "…" if width > 0 else ""


def wrap_text(text: str, width: int | None, indent: int) -> list[str]:
    """The lines of a text in `width` columns, the later ones indented. It breaks at blanks only, so that a path stays
    whole. None: one line."""
    first, *words = text.split(" ")
    lines = [first]
    for word in words:
        longer = f"{lines[-1]} {word}"
        if width is None or text_width(longer) <= width or not lines[-1].strip():
            lines[-1] = longer
        else:
            lines.append(" " * indent + word)
    return lines
