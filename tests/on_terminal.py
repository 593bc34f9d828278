"""A terminal of a given width, to see what a function prints on it."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Callable
from typing import IO

from stages.contract.events import output_to


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


def shown_on_terminal(width: int, function: Callable[[], object]) -> list[str]:
    """The lines that a function prints on a terminal of `width` columns, on standard output and standard error, without
    colours."""
    terminal = Terminal(width)
    try:
        with output_to(terminal.slave):
            function()
    finally:
        content = terminal.close()
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", content).splitlines()
