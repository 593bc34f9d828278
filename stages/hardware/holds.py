"""Reserves GPUs for this Lorry process: a lock file for each GPU, in a folder that all users of the host share.

The locks are those of flock(2), which the kernel releases when their process dies, even by SIGKILL. A file without a
lock means nothing and stays. /proc/locks says which process holds a lock.
"""

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stages.contract.errors import InterruptedRunError, UsageError
from stages.hardware.probe import PROC, process_user

FOLDER = Path("/tmp/lorry-gpus")
"""One folder for the whole host, since jobs of different users share its GPUs."""

PATIENCE = 10.0
"""Seconds to wait while another Lorry process chooses GPUs, which takes milliseconds."""


@dataclass(frozen=True)
class Lock:
    """A lock that a process holds."""

    pid: int
    user: str
    """Name of the process's user; `?` if it cannot be seen."""
    exclusive: bool
    """Whether the process shares the GPU with no other."""

    def __str__(self) -> str:
        return f"lorry, pid {self.pid} of {self.user}"


class Holds:
    """The GPUs that this process holds, by UUID, until it calls `close` or dies."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(os.environ.get("LORRY_GPU_HOLDS") or FOLDER)
        self._held: dict[str, int] = {}
        self._directory: int | None = None

    @contextmanager
    def choice_lock(self) -> Iterator[None]:
        """Keep other Lorry processes from choosing GPUs while the context is open.

        Otherwise, two processes that each want two of three GPUs could both fail. Raises InterruptedRunError if another
        process is still choosing after PATIENCE seconds, and UsageError if the lock file cannot be used.
        """
        descriptor = self._open_lock_file("choosing")
        try:
            until = time.monotonic() + PATIENCE
            while not _try_lock(descriptor, fcntl.LOCK_EX):
                if time.monotonic() > until:
                    holder = next(iter(self.holders("choosing")), "another process")
                    raise InterruptedRunError(
                        f"{self.folder}/choosing: {holder} has been choosing GPUs for {PATIENCE:.0f} s; run again, or"
                        " check whether that process hangs"
                    )
                time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)

    def take(self, uuid: str, exclusive: bool) -> bool:
        """Hold a GPU. Returns False if another process holds it and one of the two holds is exclusive.

        Raises UsageError if the lock file cannot be used.
        """
        while True:
            descriptor = self._open_lock_file(uuid)
            if not _try_lock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
                os.close(descriptor)
                return False
            if self._is_current(uuid, descriptor):
                self._held[uuid] = descriptor
                return True
            os.close(descriptor)  # a cleaner of /tmp deleted the file between opening and locking

    def release(self, uuid: str) -> None:
        """Release one GPU. Raises KeyError if this process does not hold it."""
        os.close(self._held.pop(uuid))

    def keep_only(self, uuids: set[str]) -> None:
        """Release all GPUs except those with these UUIDs."""
        for uuid in self._held.keys() - uuids:
            self.release(uuid)

    def holders(self, name: str) -> list[Lock]:
        """The locks that processes hold on a file of the folder; `name` is a GPU's UUID, or `choosing`.

        Empty if there are none, or if this process cannot see them.
        """
        try:
            found = (self.folder / name).lstat()
            table = (PROC / "locks").read_text()
        except OSError:
            return []
        # on file systems such as btrfs the device numbers differ, so they only decide between equal inodes
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        rows = [row for row in map(str.split, table.splitlines()) if _is_flock(row)]
        rows = [row for row in rows if row[5].rpartition(":")[2] == str(found.st_ino)]
        same = [row for row in rows if row[5].rpartition(":")[0] == device]
        return [Lock(int(row[4]), process_user(int(row[4])), row[3] == "WRITE") for row in same or rows]

    def close(self) -> None:
        """Release all GPUs, and the lock on the folder."""
        for uuid in [*self._held]:
            self.release(uuid)
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    def _open_lock_file(self, name: str) -> int:
        """Open a lock file, or create it, and return its descriptor. Raises UsageError if that fails.

        A lock needs only read access, so the file may belong to another user. Links are not followed, and an existing
        file is not opened with O_CREAT, which fs.protected_regular refuses for other users' files.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block
        try:
            directory = self._open_directory()
            with suppress(FileNotFoundError):
                return self._require_regular(os.open(name, flags, dir_fd=directory))
            with suppress(FileExistsError):
                descriptor = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=directory)
                os.fchmod(descriptor, 0o644)  # whatever the umask is
                return descriptor
            return self._require_regular(os.open(name, flags, dir_fd=directory))  # another process was quicker
        except OSError as error:
            raise self._unusable_error(name, error.strerror or str(error)) from error

    def _open_directory(self) -> int:
        """Open the folder of the lock files, and create it first if it is missing. Returns its descriptor.

        Takes a shared lock on the folder, as systemd-tmpfiles does not clean a folder that is locked.
        """
        if self._directory is None:
            with suppress(FileExistsError):
                self.folder.mkdir(parents=True)
                self.folder.chmod(0o1777)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._directory = os.open(self.folder, flags)
            _try_lock(self._directory, fcntl.LOCK_SH)
        return self._directory

    def _require_regular(self, descriptor: int) -> int:
        """Return the descriptor if it is that of a regular file; else close it and raise OSError."""
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("not a regular file")
        return descriptor

    def _is_current(self, name: str, descriptor: int) -> bool:
        """Whether a descriptor is still that of the file with this name."""
        try:
            now = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(now, os.fstat(descriptor))

    def _unusable_error(self, name: str, why: str) -> UsageError:
        """The error for a lock file that cannot be used."""
        return UsageError(
            f"{self.folder}/{name}: cannot hold a GPU with this file ({why}); delete the folder while no Lorry"
            f" process runs (sudo rm -rf {self.folder}), or name another one of mode 1777 (LORRY_GPU_HOLDS)"
        )


def _try_lock(descriptor: int, kind: int) -> bool:
    """Lock a file without waiting. Returns False if another process has it locked."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_flock(row: list[str]) -> bool:
    """Whether a line of /proc/locks is a flock that a process holds, and not one that it waits for."""
    return len(row) > 5 and row[1] == "FLOCK"
