"""The character encoding of text files: UTF-8, UTF-16, UTF-32 or GBK.

Windows programs save Chinese text as GBK or UTF-16. UTF-16 and UTF-32 show in a file's first bytes. A file is GBK if
most of its lines with Chinese are not UTF-8, and all of it is GBK that is mostly made of common characters. Any other
file is read as UTF-8, where a line in another encoding becomes a bad record.
"""

import codecs
import json
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

from stages.contract.files import data_files

UTF8 = "utf-8"
GBK = "gb18030"
"""Python's name of the codec that reads GBK and all that extends it."""

COMMON = 0.75
"""Smallest share of a GBK text's characters outside ASCII that are in GB2312. Chinese prose has nearly all there; of
UTF-8 or Big5 read as GBK, about half are."""

CHUNK = 2**20

ENDINGS = (".json", ".jsonl", ".ndjson", ".tsv", ".urdf")
"""Endings of text files that hold data, in lower case."""


def encoding_of(path: Path) -> str:
    """The codec that reads a text file: `utf-8`, also for one with a byte order mark or with other bytes than UTF-8's,
    `utf-16...`, `utf-32...` or `gb18030`."""
    status = path.stat()
    return _encoding_of(path, status.st_size, status.st_mtime_ns)


@cache
def _encoding_of(path: Path, size: int, changed: int) -> str:
    """`encoding_of`, once for each state of a file: it reads all of it."""
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
    """The data files below a folder that are not UTF-8, by their path in it, each with the name of its encoding, such
    as `GBK`; without the folder of documents."""
    found = {}
    for path in data_files(folder):
        inside = path.relative_to(folder)
        if path.suffix.lower() in ENDINGS and inside.parts[0] != "documents" and encoding_of(path) != UTF8:
            found[str(inside)] = "GBK" if encoding_of(path) == GBK else encoding_of(path).upper()[: len("UTF-16")]
    return found


def _wide_encoding(beginning: bytes) -> str | None:
    """The encoding that a file's first four bytes show, if it has two or four bytes a character."""
    found = json.detect_encoding(beginning) if len(beginning) > 1 else UTF8
    return found if found.startswith(("utf-16", "utf-32")) else None


def _is_gbk(lines: Iterator[bytes] | list[bytes]) -> bool:
    """Whether lines, some of which are not UTF-8, are GBK."""
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
    """The lines of a text file in UTF-8, without byte order marks, read one at a time. Bytes that are not of the file's
    encoding stay as they are in UTF-8, and become U+FFFD in others."""
    encoding = encoding_of(path)
    if encoding == UTF8:
        with path.open("rb") as file:  # in bytes: text would also be split at U+2028, which JSON may contain
            yield from (line.removeprefix(codecs.BOM_UTF8) for line in file)
        return
    with path.open(encoding=encoding, errors="replace", newline="\n") as text:
        yield from (line.removeprefix("\ufeff").encode() for line in text)


def decode(content: bytes) -> str:
    """The text of a file's content, without a byte order mark. Raises UnicodeDecodeError (a ValueError) where no
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
