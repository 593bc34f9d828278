"""Files that survive a kill: atomic writes, JSON Lines with a torn tail, digests."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stages.contract.errors import DoesNotFitError, LorryError, UsageError


def canonical_json(value: Any) -> str:
    """A value's one spelling in JSON: sorted keys, no spaces, no escapes for non-ASCII. Equal values, equal texts."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_name(path: Path) -> str:
    """A path as valid UTF-8 text. Other bytes, as in old archives, are escaped: `\\xb5`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextmanager
def open_atomically(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears at `path` only when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _partial(path: Path) -> Path:
    """A temporary name beside a file, with the host's name: containers on one storage may have equal process ids."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with open_atomically(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; None without the file. Raises UsageError for a file that is not JSON."""
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
    """The records of a JSON Lines file that was written whole."""
    # str.splitlines would also split at U+2028, which JSON text may contain
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


class JsonlJournal:
    """A JSON Lines file to append to, of which a kill may tear the last line.

    Opening it reads the whole records and cuts off a torn last line.
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
        """Add records. After this returns, a SIGKILL of this process does not lose them."""
        new = list(records)
        self._file.write("".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in new))
        self._file.flush()
        self.records.extend(new)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "JsonlJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileHashes:
    """sha256 of files, cached by size, time stamps and inode so that unchanged files are not read again.

    The cache is one JSON file in the run folder. Losing it costs time, never correctness. A file that changed in the
    last two seconds is not cached: another change could leave the same size and time stamps.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        try:
            self._known = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def file(self, path: Path) -> str:
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

    def tree(self, folder: Path) -> tuple[str, int]:
        """Digest (sha256, hex) of a folder's visible files, by relative name and content, and their number."""
        entries = {stored_name(p.relative_to(folder)): self.file(p) for p in visible_files(folder)}
        return digest_of(entries), len(entries)

    def save(self) -> None:
        """Write the cache; if the folder cannot be written, the next start only takes longer."""
        if self._changed:
            try:
                write_json(self._memory, self._known)
            except OSError:
                return
            self._changed = False


def visible_files(folder: Path) -> list[Path]:
    """Regular files below a folder, sorted, without hidden files and folders."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not _is_hidden(f))
        found += [Path(root) / name for name in names if not _is_hidden(name)]
    return sorted(path for path in found if path.is_file())


def _is_hidden(name: str) -> bool:
    """Whether one dot begins the name. Two may be a title's ellipsis, and such a file must not be lost in silence."""
    return name.startswith(".") and not name.startswith("..")


def place_same(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link, or a copy if the file system has no links.

    Only for files that are replaced whole, never changed in place.
    """
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
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


# the messages of Rust, numpy and torch, which carry no errno
_FULL = re.compile(
    r"No space left on device|os error 28|Not enough free space to write|\d+ requested and \d+ written"
    r"|PytorchStreamWriter failed writing"
)


_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory", re.IGNORECASE)


def machine_error(error: BaseException) -> LorryError | None:
    """The one-line error for a full disk, a forbidden file or lack of memory; None if `error` is something else.

    Libraries in C and Rust raise their own types for these, so this reads their messages too.
    """
    seen: BaseException | None = error
    while seen is not None:
        code = seen.errno if isinstance(seen, OSError) else None
        where = f" at {seen.filename}" if isinstance(seen, OSError) and seen.filename else ""
        text = str(seen)
        if code in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(text):
            return DoesNotFitError(
                f"the disk is full{where}; free some space and run the same command again: finished work is kept"
            )
        if isinstance(seen, MemoryError) or _OUT_OF_MEMORY.search(text):
            return DoesNotFitError(f"out of memory ({' '.join(text.split())[:200]}); set a smaller batch or length")
        if code in (errno.EROFS, errno.EACCES, errno.EPERM):
            return UsageError(f"not permitted{where}: {os.strerror(code)}; {_permission_cure(code, seen)}")
        seen = seen.__cause__ or seen.__context__
    return None


def _permission_cure(code: int, error: BaseException) -> str:
    """The cure for a forbidden file: who owns it or its folder, and the command that gives this process access."""
    filename = error.filename if isinstance(error, OSError) else None
    needs = "the data and model folders must be readable and the run folder writable"
    if code == errno.EROFS:
        return f"{needs}: mount the run folder read-write"
    uid, gid = os.getuid(), os.getgid()
    if not isinstance(filename, str | bytes):
        return f"{needs} for uid {uid}"
    path = Path(os.fsdecode(filename)).absolute()
    while not os.access(path, os.F_OK):  # up to a path that exists and can be seen
        path = path.parent
    if path.stat().st_uid == uid and os.access(path, os.R_OK | os.W_OK):  # then its folder forbids it
        path = path.parent
    owner, folder = path.stat().st_uid, path if path.is_dir() else path.parent
    if owner == uid:
        return f"{path} belongs to this uid {uid}, but its mode forbids access: chmod -R u+rwX {folder}"
    return (
        f"{path} belongs to uid {owner}, this process is uid {uid}; chown -R {uid}:{gid} {_host_name(folder)}, or"
        " start as its owner (Compose: LORRY_UID=$(id -u) LORRY_GID=$(id -g))"
    )


def _host_name(folder: Path) -> str:
    """A folder's name for somebody outside the container, if this process is in one."""
    return f"the host's folder mounted as {folder}" if "LORRY_IMAGE" in os.environ else str(folder)
