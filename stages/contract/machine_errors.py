"""Explains errors of the machine: a full disk, a forbidden file, a lost mount, too many open files, no memory.

`machine_error` turns such an error into a LorryError with a cure. ERRORS is the one list of them.
"""

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from stages.contract.errors import DoesNotFitError, InterruptedRunError, LorryError, UsageError


@dataclass(frozen=True)
class _Kind:
    """Errors of the operating system with the same cure."""

    codes: tuple[int, ...]
    """Numbers of `errno`."""
    error: type[LorryError]
    """The LorryError to raise: it has the exit code."""
    found: str
    """What was found."""
    cure: str
    """What to do; empty: `_permission_cure` says it."""
    texts: tuple[str, ...] = ()
    """Regular expressions for messages of libraries whose errors have no number."""
    needs_file: bool = False
    """Whether the error counts only if it names a file: sockets have the same numbers."""


_AGAIN = "run the same command again"
_OTHER_FOLDER = "or set LORRY_RUNS to a folder on another disk"
_LOCKS = (
    "mount it with locks (NFS: start rpc.statd, or mount with -o nolock or local_lock=all if no other machine uses the"
    f" run), {_OTHER_FOLDER}"
)

ERRORS = (
    _Kind(
        (),
        DoesNotFitError,
        "/dev/shm is full",
        "enlarge it (`mount -o remount,size=16g /dev/shm`; containers: --shm-size=16g; pods: sizeLimit of the volume"
        f" shm) and {_AGAIN}",
        (r"/(dev/shm|torch_).*No space left", r"No space left.*/(dev/shm|torch_)"),
    ),
    _Kind(
        (errno.ENOSPC,),
        DoesNotFitError,
        "the disk is full, finished work is kept",
        f"free some space and {_AGAIN}",
        (
            r"No space left on device",
            r"Not enough free space to write",
            r"\d+ requested and \d+ written",  # numpy
            r"PytorchStreamWriter failed writing",
            r"database or disk is full",  # SQLite
        ),
    ),
    _Kind(
        (errno.EDQUOT,),
        DoesNotFitError,
        "the disk quota is used up, finished work is kept",
        f"delete files of yours or ask for a larger quota (`quota -s` shows it) and {_AGAIN}",
        (r"Disk quota exceeded",),
    ),
    _Kind(
        (errno.EFBIG,),
        DoesNotFitError,
        "the file is too large for this file system or for `ulimit -f`",
        f"raise the limit, {_OTHER_FOLDER}",
        (r"File too large",),
    ),
    _Kind(
        (errno.EMFILE,),
        DoesNotFitError,
        "this process may not open more files",
        f"raise the limit (`ulimit -n 65536`; containers: --ulimit nofile=65536) and {_AGAIN}",
        (r"Too many open files(?! in system)",),
    ),
    _Kind(
        (errno.ENFILE,),
        DoesNotFitError,
        "this machine may not open more files",
        f"end other programs or raise the limit (`sysctl fs.file-max`) and {_AGAIN}",
        (r"Too many open files in system",),
    ),
    _Kind(
        (),  # EAGAIN also means that a pipe is full
        DoesNotFitError,
        "no more processes or threads are allowed here",
        f"lower the stage's workers, or raise the limit (`ulimit -u`; containers: --pids-limit), and {_AGAIN}",
        (r"can't start new thread", r"Resource temporarily unavailable"),
    ),
    _Kind((errno.EACCES, errno.EPERM), UsageError, "not permitted", ""),
    _Kind(
        (errno.EROFS,),
        UsageError,
        "not permitted",
        "make the data and model folders readable and the run folder writable (mount it read-write)",
        (r"Read-only file system", r"attempt to write a readonly database"),
    ),
    _Kind(
        (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP),
        UsageError,
        "this file system does not support the call, such as a lock",
        _LOCKS,
        (r"No locks available", r"locking protocol"),  # the second one is SQLite's
    ),
    _Kind(
        (errno.ENAMETOOLONG,),
        UsageError,
        "the name is too long for this file system",
        "shorten the names of the run, adapters and input files, or use folders with shorter paths",
        (r"File name too long",),
    ),
    _Kind(
        (errno.ELOOP,),
        UsageError,
        "the links lead to each other",
        "correct the links, or name another folder",
    ),
    _Kind(
        (errno.ESTALE,),
        InterruptedRunError,
        "the server has replaced this file or folder, finished work is kept",
        f"mount the folder again if it cannot be listed, then {_AGAIN}",
        (r"Stale (NFS )?file handle",),
    ),
    _Kind(
        (errno.EIO, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO, errno.EUCLEAN, errno.EBADMSG),
        DoesNotFitError,
        "the disk or its server failed, finished work is kept",
        f"see `dmesg`, check the disk, its cable or the mount, then {_AGAIN}",
        (r"Input/output error", r"disk I/O error"),  # the second one is SQLite's
    ),
    _Kind(
        (errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        InterruptedRunError,
        "the server of this folder does not answer, finished work is kept",
        f"mount the folder again, then {_AGAIN}",
        needs_file=True,
    ),
    _Kind(
        (errno.EBUSY, errno.ETXTBSY),
        InterruptedRunError,
        "another process uses this file or folder, finished work is kept",
        f"end that process (`fuser -v` names it), then {_AGAIN}",
        needs_file=True,
    ),
)
"""The errors of the operating system that are not bugs in Lorry."""

_NUMBER = re.compile(r"(?:os error|\[errno:?) (\d+)", re.IGNORECASE)
"""The number of an operating system's error in a message: `os error 28` of Rust, `[Errno 28]` of Python and Arrow."""

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory", re.IGNORECASE)


def machine_error(error: BaseException) -> LorryError | None:
    """The LorryError for an error in ERRORS or a lack of memory; None for any other error.

    Also searches the causes of the error, and their messages, as libraries in C and Rust raise types of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, MemoryError) or _OUT_OF_MEMORY.search(text):
            return DoesNotFitError(
                f"out of memory ({' '.join(text.split())[:200]}); lower the stage's workers, batch size or max_length"
                " in the recipe, or use a machine with more memory"
            )
        number = _error_number(seen)
        for kind in ERRORS:
            if number in kind.codes or any(re.search(one, text) for one in kind.texts):
                return _explained(kind, seen, number)
        seen = seen.__cause__ or seen.__context__
    return None


def raise_machine_fault(error: BaseException) -> None:
    """Raise the LorryError for a machine that fails whatever the file: a full or lost disk, a limit on open files.

    Returns for any other error, such as a forbidden file. Call it before a file or record is blamed for an error. Only
    errors with a number count: a damaged file can lead to a message about memory.
    """
    explained = machine_error(error) if isinstance(error, OSError) and error.errno else None
    if isinstance(explained, DoesNotFitError | InterruptedRunError):
        raise explained from error


def _error_number(error: BaseException) -> int | None:
    """The number of the operating system's error, from the error or its message; None without one.

    Also None for numbers that count only with a file, if the error names none.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _NUMBER.search(str(error))):
        number = int(found[1])
    named = isinstance(error, OSError) and error.filename is not None
    if not named and any(number in kind.codes for kind in ERRORS if kind.needs_file):
        return None
    return number


def _explained(kind: _Kind, error: BaseException, number: int | None) -> LorryError:
    """The LorryError of a kind. It names the error's file and the operating system's error, if there are any."""
    filename = error.filename if isinstance(error, OSError) else None
    where = f"{os.fsdecode(filename)}: " if isinstance(filename, str | bytes) else ""
    cure = kind.cure or _permission_cure(error)
    found = f"{kind.found} ({os.strerror(number)})" if number is not None else kind.found
    return kind.error(f"{where}{found}; {cure}")


def _permission_cure(error: BaseException) -> str:
    """Text that says who owns a forbidden file or its folder, and which command gives this process access.

    If the error names no file, it is general advice instead.
    """
    filename = error.filename if isinstance(error, OSError) else None
    uid, gid = os.getuid(), os.getgid()
    if not isinstance(filename, str | bytes):
        return f"make the data and model folders readable and the run folder writable for uid {uid}"
    path = Path(os.fsdecode(filename)).absolute()
    while not os.access(path, os.F_OK):  # up to a path that exists and can be seen
        path = path.parent
    if path.stat().st_uid == uid and os.access(path, os.R_OK | os.W_OK):  # then its folder forbids it
        path = path.parent
    owner, folder = path.stat().st_uid, path if path.is_dir() else path.parent
    if owner == uid:
        return f"{path} belongs to this uid {uid}, but its mode forbids access; chmod -R u+rwX {folder}"
    found = f"{path} belongs to uid {owner}, this process is uid {uid}"
    if in_pod():
        return f"{found}; give the pod its group (securityContext: fsGroup {path.stat().st_gid}) or its uid (runAsUser)"
    return (
        f"{found}; chown -R {uid}:{gid} {_name_on_host(folder)}, or start as its owner"
        " (Compose: LORRY_UID=$(id -u) LORRY_GID=$(id -g))"
    )


def _name_on_host(folder: Path) -> str:
    """The text that names a folder to a user on the host. In a container, it says that the folder is a mounted one."""
    return f"the host's folder mounted as {folder}" if "LORRY_IMAGE" in os.environ else str(folder)


def in_pod() -> bool:
    """Whether this process runs from an image of Lorry in a pod of Kubernetes, where advice for a Docker engine is of
    no use. The kubelet sets the address of the API server in every container."""
    return "LORRY_IMAGE" in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ
