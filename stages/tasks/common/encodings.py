"""The character encoding of text files: UTF-8, UTF-16, UTF-32 or GBK.

Windows programs save Chinese text as GBK or UTF-16. The first bytes of a file show UTF-16 and UTF-32. A file counts as
GBK if most of its lines that are not ASCII are invalid UTF-8, and if all of it is valid GBK with mostly common
characters. Any other file is read as UTF-8, where a line in another encoding becomes a bad record.
"""

import codecs
import json
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

from stages.contract.files import data_files

UTF8 = "utf-8"
GBK = "gb18030"
"""Python's codec for GBK and its extensions."""

COMMON = 0.75
"""Smallest share of a GBK text's characters outside ASCII that must be in GB2312. In Chinese prose nearly all are; in
UTF-8 or Big5 misread as GBK, about half."""

CHUNK = 2**20

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".urdf")
"""Endings of text files that hold data, in lower case."""


def encoding_of(path: Path) -> str:
    """The codec that reads a text file: `utf-16...`, `utf-32...`, `gb18030`, or else `utf-8`, even if the file has a
    byte order mark or bytes that are not UTF-8."""
    status = path.stat()
    return _encoding_of(path, status.st_size, status.st_mtime_ns)


@cache
def _encoding_of(path: Path, size: int, changed: int) -> str:
    """`encoding_of`, cached by size (bytes) and time of change (ns), because it may read the whole file."""
    with path.open("rb") as file:
        wide = _wide_encoding(file.read(4))
        file.seek(0)
        if wide is not None:
            return wide
        decoder = codecs.getincrementaldecoder(UTF8)()
        try:
            while chunk := file.read(CHUNK):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            file.seek(0)
            return GBK if _is_gbk(file) else UTF8
    return UTF8


def other_encodings(folder: Path) -> dict[str, str]:
    """The encodings (`GBK`, `UTF-16` or `UTF-32`) of text files in encodings other than UTF-8, by path relative to
    `folder`, or to its parent if it is a file. Checks the data files whose names end with one of ENDINGS, except those
    in `documents/`."""
    found = {}
    for path in data_files(folder):
        inside = path.relative_to(folder if folder.is_dir() else folder.parent)
        if path.suffix.lower() in ENDINGS and inside.parts[0] != "documents" and encoding_of(path) != UTF8:
            found[str(inside)] = "GBK" if encoding_of(path) == GBK else encoding_of(path).upper()[: len("UTF-16")]
    return found


def _wide_encoding(beginning: bytes) -> str | None:
    """The UTF-16 or UTF-32 codec that a file's first four bytes show; None if they show neither."""
    found = json.detect_encoding(beginning) if len(beginning) > 1 else UTF8
    return found if found.startswith(("utf-16", "utf-32")) else None


def _is_gbk(lines: Iterator[bytes] | list[bytes]) -> bool:
    """Whether lines, some of which are not UTF-8, are GBK: all must be valid GBK, most of those that are not ASCII must
    be invalid UTF-8, and at least the share COMMON of their characters outside ASCII must be in GB2312."""
    utf8 = other = common = characters = 0
    for line in lines:
        if line.isascii():
            continue
        try:
            line.decode(UTF8)
            utf8 += 1
        except UnicodeDecodeError:
            other += 1
        try:
            text = line.decode(GBK)
        except UnicodeDecodeError:
            return False
        beyond = [character for character in text if not character.isascii()]
        characters += len(beyond)
        common += len("".join(beyond).encode("gb2312", "ignore")) // 2
    return other > utf8 and common >= COMMON * characters


def utf8_lines(path: Path) -> Iterator[bytes]:
    """The lines of a text file, converted to UTF-8 and without byte order marks, read one at a time. Invalid bytes stay
    as they are in a UTF-8 file, and become U+FFFD in a file of another encoding."""
    encoding = encoding_of(path)
    if encoding == UTF8:
        with path.open("rb") as file:  # in bytes: text would also be split at U+2028, which JSON may contain
            yield from (line.removeprefix(codecs.BOM_UTF8) for line in file)
        return
    with path.open(encoding=encoding, errors="replace", newline="\n") as text:
        yield from (line.removeprefix("\ufeff").encode() for line in text)


def decode(content: bytes) -> str:
    """The text of a file's content, without a byte order mark. Raises UnicodeDecodeError (a ValueError) if no
    encoding fits."""
    wide = _wide_encoding(content[:4])
    if wide is not None:
        return content.decode(wide).removeprefix("\ufeff")
    try:
        return content.decode(UTF8).removeprefix("\ufeff")
    except UnicodeDecodeError:
        if _is_gbk(content.splitlines()):
            return content.decode(GBK)
        raise
