"""A terminal of a given width, to see what a function prints on it."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO


class Terminal:
    """A pseudo-terminal, and what was written to it."""

    def __init__(self, width: int) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self._content = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        """Read until all writers have closed the terminal."""
        while True:
            try:
                self._content += os.read(self.master, 65_536)
            except OSError:  # EIO: no writer is left
                return

    def open(self) -> IO[str]:
        """The terminal as a text file."""
        return os.fdopen(os.dup(self.slave), "w", encoding="utf-8")

    def close(self) -> str:
        """Close the terminal. Returns all that was written to it."""
        os.close(self.slave)
        self._reader.join()
        os.close(self.master)
        return self._content.decode()


@contextmanager
def standard_output_on(terminal: Terminal) -> Iterator[None]:
    """Make the terminal this process's standard output and standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(terminal.slave, 1)
    os.dup2(terminal.slave, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, real in enumerate(saved, start=1):
            os.dup2(real, number)
            os.close(real)


def shown_on_terminal(width: int, function: Callable[[], object]) -> list[str]:
    """The lines that a function prints on a terminal of `width` columns, on standard output and standard error, without
    colours."""
    terminal = Terminal(width)
    try:
        with standard_output_on(terminal):
            function()
    finally:
        content = terminal.close()
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", content).splitlines()
