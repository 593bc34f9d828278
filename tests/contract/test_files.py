"""Files survive kills, full disks and unusual text."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract import files
from stages.contract.errors import UsageError
from stages.contract.files import (
    FileHashes,
    JsonlJournal,
    data_files,
    digest_of,
    open_atomically,
    read_json,
    read_jsonl,
    unread_data,
    visible_files,
    write_json,
    write_jsonl,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
records = st.lists(st.dictionaries(text, text | st.integers() | st.none(), max_size=3), max_size=6)


# -- atomic writes -------------------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), open_atomically(path) as file:
        file.write("half")
        file.flush()
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_a_kill_while_writing_leaves_no_file_under_the_name(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, pathlib\nfrom stages.contract.files import open_atomically\n"
        "with open_atomically(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write('half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.txt")], check=False)
    assert done.returncode == -9
    assert visible_files(tmp_path) == [], "the half file must be hidden from whoever lists the folder"


def test_the_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with open_atomically(path, "wb") as file:
        file.write(b"\0\1")
        assert not path.exists()
    assert path.read_bytes() == b"\0\1"


def test_a_record_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(path, [{"a": 2}, {"a": float("nan")}])
    assert read_jsonl(path) == [{"a": 1}]


def test_damaged_json_says_which_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    assert read_json(path) is None
    path.write_text('{"a": ')
    with pytest.raises(UsageError, match=str(path)):
        read_json(path)


# -- JSON Lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x1e", "\r", "\n", "\x0b", "\ufeff", "图\U0001f600"])
def test_text_with_line_breaks_of_all_kinds_comes_back(tmp_path: Path, odd: str) -> None:
    rows = [{"text": f"a{odd}b"}, {"text": odd}]
    assert write_jsonl(tmp_path / "a.jsonl", rows) == 2
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    with JsonlJournal(tmp_path / "b.jsonl") as journal:
        journal.append(rows)
    with JsonlJournal(tmp_path / "b.jsonl") as journal:
        assert journal.records == rows


@given(records, st.data())
@settings(max_examples=150)
def test_a_journal_cut_anywhere_gives_a_prefix_and_goes_on(tmp_path_factory, rows, data) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("journal") / "a.jsonl"
    with JsonlJournal(path) as journal:
        journal.append(rows)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    with JsonlJournal(path) as journal:
        assert journal.records == rows[:whole]
        journal.append([{"after": 1}])
    assert read_jsonl(path) == [*rows[:whole], {"after": 1}]


def test_a_block_of_zeros_at_the_end_is_cut_off(tmp_path: Path) -> None:
    """What some file systems leave after a power cut."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"\0" * 50 + b"\n")
    with JsonlJournal(path) as journal:
        assert journal.records == [{"a": 1}]
        journal.append([{"b": 2}])
    assert read_jsonl(path) == [{"a": 1}, {"b": 2}]


def test_an_appended_record_survives_a_kill(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, pathlib\nfrom stages.contract.files import JsonlJournal\n"
        "JsonlJournal(pathlib.Path(sys.argv[1])).append([{'n': n} for n in range(100)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.jsonl")], check=False)
    assert len(read_jsonl(tmp_path / "a.jsonl")) == 100


# -- digests -------------------------------------------------------------------------------------------------------


@given(st.dictionaries(text, st.integers(), max_size=5), st.randoms())
def test_equal_values_have_equal_digests(value, random) -> None:  # type: ignore[no-untyped-def]
    items = list(value.items())
    random.shuffle(items)
    assert digest_of(dict(items)) == digest_of(value)
    assert digest_of({**value, "one more": 0}) != digest_of(value) or "one more" in value


def aged(path: Path, content: bytes, seconds: int = 60) -> Path:
    """Write a file and wait for nothing: its modification time is put into the past."""
    path.write_bytes(content)
    past = time.time_ns() - seconds * 10**9
    os.utime(path, ns=(past, past))
    return path


def test_a_change_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    path = aged(tmp_path / "a", b"one")
    hashes = FileHashes(tmp_path / ".memory")
    first = hashes.file_digest(path)
    path.write_bytes(b"two")
    assert hashes.file_digest(path) != first


def test_a_change_right_after_hashing_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in (b"0", b"1", b"2", b"3", b"4", b"5"):  # within one tick of the file system's clock
        path.write_bytes(content)
        hashes = FileHashes(tmp_path / ".memory")
        digest = hashes.file_digest(path)
        hashes.save()
        assert digest == FileHashes(tmp_path / "none").file_digest(path)


def test_a_change_that_keeps_size_and_time_stamp_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from `cp -p` and from archives whose files all bear one date."""
    path = aged(tmp_path / "a", b"one")
    stamp = path.stat().st_mtime_ns
    hashes = FileHashes(tmp_path / ".memory")
    now = time.time_ns()
    monkeypatch.setattr(files.time, "time_ns", lambda: now + 60 * 10**9)  # a minute later it is remembered
    first = hashes.file_digest(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp))
    assert hashes.file_digest(path) != first


def test_an_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    now = time.time_ns()
    monkeypatch.setattr(files.time, "time_ns", lambda: now + 60 * 10**9)
    hashes = FileHashes(tmp_path / ".memory")
    digest = hashes.file_digest(path)
    hashes.save()

    def read_again(_: Path) -> str:
        raise AssertionError

    monkeypatch.setattr(files, "sha256_file", read_again)
    assert FileHashes(tmp_path / ".memory").file_digest(path) == digest


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff"])
def test_a_damaged_memory_costs_only_time(tmp_path: Path, damage: bytes) -> None:
    path = aged(tmp_path / "a", b"one")
    (tmp_path / ".memory").write_bytes(damage)
    assert FileHashes(tmp_path / ".memory").file_digest(path) == FileHashes(tmp_path / "none").file_digest(path)


def test_a_folders_digest_follows_names_and_content_but_not_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b"):
        (tmp_path / name).write_text(name)
    hashes = FileHashes(tmp_path / ".memory")
    before = hashes.tree_digest(tmp_path)
    assert before[1] == 2
    (tmp_path / ".hidden").write_text("x")
    assert hashes.tree_digest(tmp_path) == before
    (tmp_path / "sub" / "b").rename(tmp_path / "sub" / "c")
    assert hashes.tree_digest(tmp_path)[0] != before[0]


def test_a_file_name_that_is_no_utf8_is_hashed_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chinese names out of old zip archives are GBK."""
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / os.fsdecode("专利.pdf".encode("gbk"))).write_bytes(b"x")
    now = time.time_ns()
    monkeypatch.setattr(files.time, "time_ns", lambda: now + 60 * 10**9)
    hashes = FileHashes(tmp_path / ".memory")
    digest = hashes.tree_digest(folder)
    hashes.save()
    assert json.loads((tmp_path / ".memory").read_text())
    assert FileHashes(tmp_path / ".memory").tree_digest(folder) == digest


def test_hidden_files_are_left_out_and_a_name_with_two_dots_in_front_is_not(tmp_path: Path) -> None:
    for name in (".hidden", ".folder/a", "..x..pdf", "...and more.pdf", "a", "sub/.hidden", "sub/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [str(path.relative_to(tmp_path)) for path in visible_files(tmp_path)]
    assert found == ["...and more.pdf", "..x..pdf", "a", "sub/b"]


def test_input_data_are_found_behind_links_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    for path in (data / "a", data / "sub/b", data / "..c", data / ".hidden", other / "in/d"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (data / "folder").symlink_to("../other")
    (data / "sub/file").symlink_to("../../other/in/d")
    (data / "nothing").symlink_to("gone")
    (data / "loop").symlink_to("loop")
    (data / "self").symlink_to(".")
    (data / "sub/root").symlink_to("/")
    (other / "back").symlink_to("../data/sub")  # sub is found on its own, and once more behind two links
    os.mkfifo(data / "pipe")
    found = [str(path.relative_to(data)) for path in data_files(data)]
    assert found == ["..c", "a", "folder/back/b", "folder/back/file", "folder/in/d", "sub/b", "sub/file"]
    assert {str(path.relative_to(data)): why for path, why in unread_data(data).items()} == {
        "nothing": ("link to nothing", "to gone"),
        "loop": ("link to nothing", "to loop"),
        "self": ("link to a folder that it is in", "to ."),
        "sub/root": ("link to a folder that it is in", "to /"),
        "folder/back/root": ("link to a folder that it is in", "to /"),
        "pipe": ("special file", ""),
    }


def test_links_among_many_folders_end(tmp_path: Path) -> None:
    """Every folder has a link to every other: the paths without a cycle are 6! for each."""
    for one in range(7):
        (tmp_path / f"{one}").mkdir()
        (tmp_path / f"{one}" / "file").write_text("")
        for other in range(7):
            (tmp_path / f"{one}" / f"to-{other}").symlink_to(f"../{other}")
    found = data_files(tmp_path)
    assert {f"{one}/file" for one in range(7)} <= {str(path.relative_to(tmp_path)) for path in found}
    assert len(found) == 7 + 7 * 6 + 7 * 6 * 5
    assert {reason for reason, _ in unread_data(tmp_path).values()} == {
        "link to a folder that it is in",
        "linked folder in linked folders",
    }


def test_json_is_written_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"名": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "名": [\n    1\n  ]\n}\n'
