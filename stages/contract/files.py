"""Reads and writes files so that a kill at any moment leaves them usable; computes their digests."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stages.contract.errors import UsageError
from stages.contract.machine_errors import raise_machine_fault


def canonical_json(value: Any) -> str:
    """A value as JSON in one canonical form, so that equal values give equal texts.

    Keys are sorted, no spaces separate the tokens, and non-ASCII characters are not escaped. Raises ValueError for a
    NaN or infinite number.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 (hex) of a value, computed over its canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_name(path: Path) -> str:
    """A path as valid UTF-8 text. Bytes that are not UTF-8, as in names from old archives, are escaped: `\\xb5`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def flush(folder: Path) -> None:
    """Have the files below a folder on the disk: from now on a power cut does not lose them."""
    for path in (one for one in folder.rglob("*") if one.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def open_atomically(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` once it is complete and on the disk.

    Creates the parent folder. After an error the temporary file is deleted, and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_path(path)
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _partial_path(path: Path) -> Path:
    """The path of this process's temporary file for `path`, in the same folder."""
    # with the host's name, as containers on one storage may have equal process ids
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with open_atomically(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; None if there is no file. Raises UsageError if the file is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error}); delete it and run again") from error


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records atomically, one JSON object per line. Returns their number."""
    count = 0
    with open_atomically(path) as file:
        for count, record in enumerate(records, start=1):  # noqa: B007 - the last value is the count
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    return count


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a complete JSON Lines file. Raises ValueError if a line is not JSON."""
    # str.splitlines would also split at U+2028, which JSON text may contain
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


class JsonlJournal:
    """A JSON Lines file that records are appended to.

    A kill may leave its last line incomplete. Opening the file reads the records before the first line that is not
    complete JSON, and cuts off that line and all after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        whole = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    try:
                        self.records.append(json.loads(line))
                    except ValueError:
                        break
                    whole += len(line)
            os.truncate(path, whole)
        self._file = path.open("a", encoding="utf-8")

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records. Once this returns, a SIGKILL of this process does not lose them."""
        new = list(records)
        self._file.write("".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in new))
        self._file.flush()
        self.records.extend(new)

    def close(self) -> None:
        """Close the file; `records` stay readable."""
        self._file.close()

    def __enter__(self) -> "JsonlJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileHashes:
    """Computes sha256 of files. A cache by size, time stamps and inode avoids reading unchanged files again.

    The cache is one JSON file in the run folder. Without it the digests are the same and only take longer. A file that
    changed in the last two seconds is not cached: another change could leave the same size and time stamps.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        try:
            self._known = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def file_digest(self, path: Path) -> str:
        """sha256 (hex) of one file."""
        stat = path.stat()
        # the change time too: a copy can keep size and modification time
        name, stamp = stored_name(path.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(name)
        if known and known[:-1] == stamp:
            return str(known[-1])
        digest = sha256_file(path)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2_000_000_000:
            self._known[name] = [*stamp, digest]
            self._changed = True
        return digest

    def tree_digest(self, folder: Path) -> tuple[str, int]:
        """sha256 (hex) over relative names and content of a folder's visible files, and the number of these files."""
        entries = {stored_name(p.relative_to(folder)): self.file_digest(p) for p in visible_files(folder)}
        return digest_of(entries), len(entries)

    def save(self) -> None:
        """Write the cache if it changed. An OSError is ignored: the next start only takes longer."""
        if self._changed:
            try:
                write_json(self._memory, self._known)
            except OSError:
                return
            self._changed = False


def visible_files(folder: Path) -> list[Path]:
    """The files below a folder and links to files, sorted, without hidden files and folders.

    Links to folders are not followed.
    """
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not _is_hidden(f))
        found += [Path(root) / name for name in names if not _is_hidden(name)]
    return sorted(path for path in found if path.is_file())


def data_files(folder: Path) -> list[Path]:
    """The files below a folder of input data and links to files, sorted, without hidden files and folders; of a file,
    only itself.

    Follows links to folders, as people link their data instead of copying it, but at most `_LINKS_DEEP` inside each
    other. `unread_data` returns what is left out.
    """
    return [folder] if folder.is_file() else _walk_data(folder)[0]


def unread_data(folder: Path) -> dict[Path, tuple[str, str]]:
    """The paths that `data_files` leaves out, with reason and detail of each, sorted by path.

    Hidden files and folders are not among them.
    """
    return {} if folder.is_file() else dict(sorted(_walk_data(folder)[1].items()))


_LINKS_DEEP = 2
"""How many links to folders are followed inside each other: links among n folders make up to n paths per level."""


def _walk_data(top: Path) -> tuple[list[Path], dict[Path, tuple[str, str]]]:
    """The files that `data_files` returns, sorted, and the paths that `unread_data` returns, not sorted."""
    files: list[Path] = []
    unread: dict[Path, tuple[str, str]] = {}
    todo: list[tuple[Path, tuple[Path, ...]]] = [(top, ())]  # a folder, and the real folders of the links to it
    while todo:
        folder, linked_from = todo.pop()
        try:
            paths = list(folder.iterdir())
        except OSError as error:
            raise_machine_fault(error)
            unread[folder] = ("folder that cannot be read", str(error.strerror))
            continue
        for path in paths:
            if _is_hidden(path.name):
                continue
            if path.is_file():
                files.append(path)
            elif not path.is_symlink() and path.is_dir():
                todo.append((path, linked_from))
            elif not path.is_symlink():
                unread[path] = ("special file", "")
            elif not path.is_dir():
                unread[path] = ("link to nothing", f"to {stored_name(path.readlink())}")
            else:
                above = (*linked_from, folder.resolve())
                if any(one.is_relative_to(path.resolve()) for one in above):
                    unread[path] = ("link to a folder that it is in", f"to {stored_name(path.readlink())}")
                elif len(linked_from) == _LINKS_DEEP:
                    unread[path] = ("linked folder in linked folders", f"to {stored_name(path.readlink())}")
                else:
                    todo.append((path, above))
    return sorted(files), unread


def _is_hidden(name: str) -> bool:
    """Whether a name begins with exactly one dot.

    Several dots may be the ellipsis of a title, and a file named after that title must be read.
    """
    return name.startswith(".") and not name.startswith("..")


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if it cannot be linked, as across file systems.

    Use it only for files that are never changed in place: a link would change with its source.
    """
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_path(target)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    partial.replace(target)


def remove(path: Path) -> None:
    """Delete a file or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
