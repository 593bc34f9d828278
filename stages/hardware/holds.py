"""Holding cards against other lorries of this host: one lock file for each card, in a folder that all users share.

The locks are flock(2)'s: the kernel drops them when the process that took them dies, however it dies, and the files,
which stay, say nothing. Who holds one is read from /proc/locks.
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
"""One for the host, since two users' jobs meet on a card."""

PATIENCE = 10.0
"""Seconds to wait for another lorry that is choosing at this moment, which takes it milliseconds."""


@dataclass(frozen=True)
class Lock:
    """A lock that some process has."""

    pid: int
    user: str
    exclusive: bool

    def __str__(self) -> str:
        return f"lorry, pid {self.pid} of {self.user}"


class Holds:
    """The cards that this process holds, by UUID, until `close` or its death."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(os.environ.get("LORRY_GPU_HOLDS") or FOLDER)
        self._held: dict[str, int] = {}
        self._directory: int | None = None

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Keep other lorries from choosing meanwhile: two that each want two of three cards must not both fail."""
        descriptor = self._open("choosing")
        try:
            until = time.monotonic() + PATIENCE
            while not _locked(descriptor, fcntl.LOCK_EX):
                if time.monotonic() > until:
                    holder = next(iter(self.holders("choosing")), "another process")
                    raise InterruptedRunError(
                        f"{self.folder}/choosing: {holder} has been choosing cards for {PATIENCE:.0f} s; run again, or"
                        " look what that process is at"
                    )
                time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)

    def take(self, uuid: str, exclusive: bool) -> bool:
        """Hold a card; False where another holds it: alone, or at all if it is wanted `exclusive`."""
        while True:
            descriptor = self._open(uuid)
            if not _locked(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
                os.close(descriptor)
                return False
            if self._is_current(uuid, descriptor):
                self._held[uuid] = descriptor
                return True
            os.close(descriptor)  # deleted, as cleaners of /tmp do, between opening and locking

    def release(self, uuid: str) -> None:
        os.close(self._held.pop(uuid))

    def keep(self, uuids: set[str]) -> None:
        """Let go of the cards but these."""
        for uuid in self._held.keys() - uuids:
            self.release(uuid)

    def holders(self, name: str) -> list[Lock]:
        """Who has the lock of a card (its UUID) now; empty where nobody has, or where it cannot be seen."""
        try:
            found = (self.folder / name).lstat()
            table = (PROC / "locks").read_text()
        except OSError:
            return []
        # device numbers differ here on file systems such as btrfs: they decide only between equal inodes
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        rows = [row for row in map(str.split, table.splitlines()) if _is_flock(row)]
        rows = [row for row in rows if row[5].rpartition(":")[2] == str(found.st_ino)]
        same = [row for row in rows if row[5].rpartition(":")[0] == device]
        return [Lock(int(row[4]), user_of(int(row[4])), row[3] == "WRITE") for row in same or rows]

    def close(self) -> None:
        """Let go of everything."""
        for uuid in [*self._held]:
            self.release(uuid)
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    def _open(self, name: str) -> int:
        """The lock file of that name, made if it is not there. It is only read: another user's can be locked too.

        Never through a link, and an existing file never with O_CREAT, which fs.protected_regular refuses for others'.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not hold us up
        try:
            directory = self._opened_directory()
            with suppress(FileNotFoundError):
                return self._checked(os.open(name, flags, dir_fd=directory))
            with suppress(FileExistsError):
                descriptor = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=directory)
                os.fchmod(descriptor, 0o644)  # whatever the umask is
                return descriptor
            return self._checked(os.open(name, flags, dir_fd=directory))  # another process was quicker
        except OSError as error:
            raise self._unusable(name, error.strerror or str(error)) from error

    def _opened_directory(self) -> int:
        """The folder, made if it is not there. It stays locked (shared) with us: systemd-tmpfiles then leaves it be."""
        if self._directory is None:
            with suppress(FileExistsError):
                self.folder.mkdir(parents=True)
                self.folder.chmod(0o1777)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._directory = os.open(self.folder, flags)
            _locked(self._directory, fcntl.LOCK_SH)
        return self._directory

    def _checked(self, descriptor: int) -> int:
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

    def _unusable(self, name: str, why: str) -> UsageError:
        return UsageError(
            f"{self.folder}/{name}: cannot be used to hold a card ({why}): it must be a plain file in a folder of mode"
            f" 1777 (sudo rm -rf {self.folder} while no lorry runs), or name another folder for all users"
            " (LORRY_GPU_HOLDS)"
        )


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_flock(row: list[str]) -> bool:
    """Whether a line of /proc/locks is a lock that is had, and not one that is waited for."""
    return len(row) > 5 and row[1] == "FLOCK"
