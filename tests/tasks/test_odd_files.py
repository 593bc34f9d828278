"""chat on 200 odd files: each conversation is read as it is, or its record is skipped with file, line and reason."""

from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import DataError
from stages.contract.records import unescape_places
from stages.tasks.chat.conversations import ChatQuestion, Reading
from tests.tasks.odd_files import OddFile, odd_files, whole_files

FILES = [*whole_files(), *odd_files()]


def said(question: ChatQuestion) -> Any:
    """A conversation as (role, content), or a plain text."""
    if question.plain is not None:
        return question.plain
    return [(one["role"], unescape_places(one["content"])) for one in question.messages]


def test_there_are_200_of_them() -> None:
    assert len(FILES) >= 200
    assert len({file.name for file in FILES}) == len(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_odd_file(tmp_path: Path, file: OddFile) -> None:
    path = tmp_path / file.name
    path.write_bytes(file.content)
    (tmp_path / "pictures").mkdir()
    skipped: list[tuple[str, str]] = []

    def skip(what: str, reason: str, detail: str = "") -> None:
        skipped.append((what, reason))

    lines: list[str] = []
    try:
        found = [said(one) for one in Reading(path, tmp_path / "pictures", None, {}, skip).questions(lines.append)]
    except DataError as error:
        assert file.expected == [] and str(path) in str(error)
        found = []
    assert found == file.expected
    assert len(skipped) == len(file.skipped), skipped
    for (what, reason), (place, wanted) in zip(skipped, file.skipped, strict=True):
        assert what.startswith(f"{file.name}{place}"), what
        assert reason.startswith(wanted), reason
    assert len(lines) == 1 and lines[0].startswith(f"{file.name}: ")
