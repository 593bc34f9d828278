"""Holds GPUs against other Lorry processes of this host: a lock file for each GPU, in a folder that all users share.

The locks are flock(2)'s: the kernel drops them when their process dies, however it dies. The files stay and mean
nothing. /proc/locks says which process holds a lock.
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
from stages.hardware.probe import PROC, user_of

FOLDER = Path("/tmp/lorry-gpus")
"""One for the whole host, since jobs of different users share its GPUs."""

PATIENCE = 10.0
"""Seconds to wait while another Lorry process chooses GPUs, which takes milliseconds."""


@dataclass(frozen=True)
class Lock:
    """A lock that a process holds."""

    pid: int
    user: str
    exclusive: bool

    def __str__(self) -> str:
        return f"lorry, pid {self.pid} of {self.user}"


class Holds:
    """The GPUs that this process holds, by UUID, until `close` or its death."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(os.environ.get("LORRY_GPU_HOLDS") or FOLDER)
        self._held: dict[str, int] = {}
        self._directory: int | None = None

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Keep other Lorry processes from choosing meanwhile: if each wants two of three GPUs, only one may fail."""
        descriptor = self._open("choosing")
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
        """Hold a GPU. False if another process holds it exclusively, or holds it at all and `exclusive` is asked."""
        while True:
            descriptor = self._open(uuid)
            if not _try_lock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
                os.close(descriptor)
                return False
            if self._is_current(uuid, descriptor):
                self._held[uuid] = descriptor
                return True
            os.close(descriptor)  # a cleaner of /tmp deleted the file between opening and locking

    def release(self, uuid: str) -> None:
        os.close(self._held.pop(uuid))

    def keep(self, uuids: set[str]) -> None:
        """Release all GPUs but these."""
        for uuid in self._held.keys() - uuids:
            self.release(uuid)

    def holders(self, name: str) -> list[Lock]:
        """The locks that processes hold on a file of the folder, such as a GPU's UUID; empty if none, or if they cannot
        be seen."""
        try:
            found = (self.folder / name).lstat()
            table = (PROC / "locks").read_text()
        except OSError:
            return []
        # on file systems such as btrfs the device numbers differ: they only decide between equal inodes
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        rows = [row for row in map(str.split, table.splitlines()) if _is_flock(row)]
        rows = [row for row in rows if row[5].rpartition(":")[2] == str(found.st_ino)]
        same = [row for row in rows if row[5].rpartition(":")[0] == device]
        return [Lock(int(row[4]), user_of(int(row[4])), row[3] == "WRITE") for row in same or rows]

    def close(self) -> None:
        """Release everything."""
        for uuid in [*self._held]:
            self.release(uuid)
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    def _open(self, name: str) -> int:
        """Open a lock file, or create it. It is opened for reading, which is enough to lock another user's file.

        Links are not followed, and an existing file is not opened with O_CREAT, which fs.protected_regular refuses for
        other users' files.
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
        """Open the folder, or create it. It stays locked (shared), so that systemd-tmpfiles does not delete it."""
        if self._directory is None:
            with suppress(FileExistsError):
                self.folder.mkdir(parents=True)
                self.folder.chmod(0o1777)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._directory = os.open(self.folder, flags)
            _try_lock(self._directory, fcntl.LOCK_SH)
        return self._directory

    def _require_regular(self, descriptor: int) -> int:
        """The descriptor. Raises OSError, and closes it, if it is not a regular file's."""
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("not a regular file")
        return descriptor

    def _is_current(self, name: str, descriptor: int) -> bool:
        try:
            now = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(now, os.fstat(descriptor))

    def _unusable_error(self, name: str, why: str) -> UsageError:
        return UsageError(
            f"{self.folder}/{name}: cannot hold a GPU with this file ({why}); it must be a regular file in a folder of"
            f" mode 1777: sudo rm -rf {self.folder} while no Lorry process runs, or name another folder for all users"
            " (LORRY_GPU_HOLDS)"
        )


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_flock(row: list[str]) -> bool:
    """Whether a line of /proc/locks is a lock that a process holds, not one that it waits for."""
    return len(row) > 5 and row[1] == "FLOCK"
