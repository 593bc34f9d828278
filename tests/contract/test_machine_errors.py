"""Errors of the machine are one line, with the exit code that a retry needs and a cure."""

import errno
import fcntl
import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.contract import run as run_module
from stages.contract.errors import DataError, DoesNotFitError, Exit, LorryError, UsageError
from stages.contract.machine_errors import ERRORS, machine_error
from stages.contract.run import Run
from stages.host.runner import run_stage
from stages.models.pictures import picture_size
from stages.tasks.common.tables import read_rows

FULL, QUOTA, AGAIN = "free some space", "quota", "run the same command again"


@pytest.mark.parametrize(
    ("number", "code", "cure"),
    [
        (errno.ENOSPC, Exit.DOES_NOT_FIT, FULL),
        (errno.EDQUOT, Exit.DOES_NOT_FIT, QUOTA),
        (errno.EFBIG, Exit.DOES_NOT_FIT, "raise the limit"),
        (errno.EMFILE, Exit.DOES_NOT_FIT, "ulimit -n"),
        (errno.ENFILE, Exit.DOES_NOT_FIT, "fs.file-max"),
        (errno.ENOMEM, Exit.DOES_NOT_FIT, "more memory"),
        (errno.EIO, Exit.DOES_NOT_FIT, "dmesg"),
        (errno.EREMOTEIO, Exit.DOES_NOT_FIT, "dmesg"),
        (errno.EACCES, Exit.USAGE, "uid"),
        (errno.EPERM, Exit.USAGE, "uid"),
        (errno.EROFS, Exit.USAGE, "read-write"),
        (errno.ENOLCK, Exit.USAGE, "LORRY_RUNS"),
        (errno.ENOSYS, Exit.USAGE, "LORRY_RUNS"),
        (errno.ENOTSUP, Exit.USAGE, "LORRY_RUNS"),
        (errno.EOPNOTSUPP, Exit.USAGE, "LORRY_RUNS"),
        (errno.ENAMETOOLONG, Exit.USAGE, "shorten"),
        (errno.ELOOP, Exit.USAGE, "correct the links"),
        (errno.ESTALE, Exit.INTERRUPTED, "mount the folder again"),
        (errno.ENOTCONN, Exit.INTERRUPTED, "mount the folder again"),
        (errno.ETIMEDOUT, Exit.INTERRUPTED, "mount the folder again"),
        (errno.EBUSY, Exit.INTERRUPTED, "end that process"),
    ],
    ids=lambda value: errno.errorcode.get(value) if isinstance(value, int) and not isinstance(value, Exit) else None,
)
def test_an_error_of_the_system_has_an_exit_code_and_a_cure(number: int, code: Exit, cure: str) -> None:
    explained = machine_error(OSError(number, os.strerror(number), "/runs/a"))
    assert explained is not None
    assert explained.exit_code == code
    found, _, advice = str(explained).partition("; ")
    assert cure in advice
    assert "\n" not in str(explained)
    assert os.strerror(number) in found
    assert found.startswith("/runs/a: ") or number == errno.ENOMEM


@pytest.mark.parametrize(
    ("text", "code", "cure"),
    [
        ("Error while serializing: I/O error: Disk quota exceeded (os error 122)", Exit.DOES_NOT_FIT, QUOTA),
        ("I/O error: No space left on device (os error 28)", Exit.DOES_NOT_FIT, FULL),
        ("[Errno 28] Error writing bytes to file. Detail: [errno 28]", Exit.DOES_NOT_FIT, FULL),
        ("[Errno 116] Failed to open local file '/data/a.parquet'", Exit.INTERRUPTED, AGAIN),
        ("6144 requested and 3040 written", Exit.DOES_NOT_FIT, FULL),
        ("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed", Exit.DOES_NOT_FIT, FULL),
        ("unable to write to file </torch_12_3_0>: No space left on device (28)", Exit.DOES_NOT_FIT, "/dev/shm"),
        ("database or disk is full", Exit.DOES_NOT_FIT, FULL),
        ("disk I/O error", Exit.DOES_NOT_FIT, "dmesg"),
        ("attempt to write a readonly database", Exit.USAGE, "read-write"),
        ("locking protocol", Exit.USAGE, "LORRY_RUNS"),
        ("basic_filebuf::xsgetn error reading the file: Input/output error", Exit.DOES_NOT_FIT, "dmesg"),
        ("can't start new thread", Exit.DOES_NOT_FIT, "ulimit -u"),
    ],
)
def test_a_librarys_message_without_a_number_is_known(text: str, code: Exit, cure: str) -> None:
    try:
        try:
            raise RuntimeError(text)
        except RuntimeError as cause:
            raise ValueError("could not save the checkpoint") from cause
    except ValueError as error:
        explained = machine_error(error)
    assert explained is not None
    assert explained.exit_code == code
    assert cure in str(explained)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("something else"),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/runs/a"),
        BlockingIOError(errno.EAGAIN, "write could not complete without blocking"),
        ConnectionError(errno.ENOTCONN, os.strerror(errno.ENOTCONN)),  # of a socket
        TimeoutError("no answer"),
        RuntimeError("CUDA error: operation not supported"),
    ],
)
def test_other_errors_stay_bugs(error: Exception) -> None:
    assert machine_error(error) is None


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOSPC], ids=errno.errorcode.get)
def test_no_file_is_blamed_for_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Else its rows or its picture would be left out, and the adapter would be trained on less."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path))

    monkeypatch.setattr(pq, "ParquetFile", fail)
    monkeypatch.setattr(Image, "open", fail)
    for read in (lambda: list(read_rows(tmp_path / "a.parquet")), lambda: picture_size(tmp_path / "a.png")):
        with pytest.raises(LorryError) as caught:
            read()
        assert str(caught.value) == str(machine_error(OSError(number, os.strerror(number), str(tmp_path))))


def test_a_damaged_file_is_still_blamed(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\xff" * 40 + b"PAR1")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    assert [row.bad is not None for row in read_rows(tmp_path / "a.parquet")] == [True]
    with pytest.raises(DataError):
        picture_size(tmp_path / "a.png")


def test_every_error_has_a_cure_of_one_line_and_no_number_stands_twice() -> None:
    numbers = [number for kind in ERRORS for number in kind.codes]
    assert len(set(numbers)) == len(numbers)
    assert all(kind.cure or errno.EACCES in kind.codes for kind in ERRORS)


@contextmanager
def limit(kind: int, amount: int) -> Iterator[None]:
    """Lower a limit of this process."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_real_limits_of_this_machine_are_explained(tmp_path: Path) -> None:
    def open_many() -> None:
        files = []
        try:
            while True:
                files.append((tmp_path / "a").open("w"))
        finally:
            for file in files:
                file.close()

    (tmp_path / "loop").symlink_to("loop")
    causes: list[tuple[Callable[[], object], str, int, int]] = [
        (open_many, "may not open more files", resource.RLIMIT_NOFILE, 60),
        (lambda: (tmp_path / "b").write_text("x" * 20_000), "too large for this file system", resource.RLIMIT_FSIZE, 9),
        (lambda: (tmp_path / ("名" * 100)).write_text(""), "the name is too long", resource.RLIMIT_NOFILE, 60),
        ((tmp_path / "loop").read_text, "the links lead to each other", resource.RLIMIT_NOFILE, 60),
    ]
    for cause, words, kind, amount in causes:
        with limit(kind, amount), pytest.raises(OSError) as caught:
            cause()
        assert words in str(machine_error(caught.value)), caught.value


def test_the_libraries_own_errors_on_a_full_disk_are_known(small_disk: Path) -> None:
    """numpy says `6144 requested and 3040 written`, without the error's number."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    def fill_database(path: Path) -> None:
        with sqlite3.connect(path) as database:
            database.execute("create table a (text)")
            database.executemany("insert into a values (?)", [("x" * 1_000_000,)] * 20)

    many = np.zeros(3_000_000)
    writers: dict[str, Callable[[Path], object]] = {
        "text": lambda path: path.write_text("x" * 20_000_000),
        "numpy": lambda path: np.save(path, many),
        "pyarrow": lambda path: pq.write_table(pa.table({"a": np.arange(3_000_000)}), path),
        "safetensors": lambda path: save_file({"a": many}, path),
        "sqlite": fill_database,
    }
    for name, write in writers.items():
        with pytest.raises(Exception) as caught:
            write(small_disk / name)
        (small_disk / name).unlink(missing_ok=True)
        assert isinstance(machine_error(caught.value), DoesNotFitError), (name, caught.value)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_runs_folder_without_locks_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    locks = SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB)
    monkeypatch.setattr(run_module, "fcntl", locks)  # the kernel's answer on such a mount
    assert run_stage(run, "preprocess", lambda _: None) == Exit.USAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"preprocess: {run.folder}/preprocess/.lock: this file system does not support the call")
    assert os.strerror(number) in line and "set LORRY_RUNS to a folder on another disk" in line


def test_a_forbidden_and_a_full_place_have_different_errors() -> None:
    assert isinstance(machine_error(OSError(errno.ENOSPC, "No space left on device", "/runs/a")), DoesNotFitError)
    assert isinstance(machine_error(OSError(errno.EROFS, "Read-only file system", "/runs/a")), UsageError)
