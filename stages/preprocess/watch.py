"""Show a worker's parent what the worker is doing, and limit its time.

The kernel keeps the time: its alarm kills the process even inside a library's C code, where no Python code runs.
"""

import signal
from collections.abc import MutableSequence

OPENING = -1
"""Stands on the board while the worker opens a document."""


class Watch:
    """The clock of this process. It limits nothing outside a worker."""

    def __init__(self) -> None:
        self._board: MutableSequence[int] = [OPENING]
        self._slot = 0
        self._seconds = 0.0

    def share(self, board: MutableSequence[int]) -> None:
        """Use a board that the parent can read: one slot per piece of work, with the 0-based page that the worker is
        at, or OPENING. Also makes the alarm end this process."""
        self._board = board
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a parent may ignore it, and a child inherits that

    def begin(self, slot: int, seconds: float) -> None:
        """Begin the piece of work that has this slot on the board. Each page may take `seconds`. Opening the document
        may take twice as long, which is enough: a worker has opened it within `seconds` before, to count its pages."""
        self._slot, self._seconds = slot, seconds
        self._board[slot] = OPENING
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)

    def restart(self) -> None:
        """Restart the time limit, for what comes next. Does nothing outside a piece of work."""
        if self._seconds:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def at_page(self, index: int) -> None:
        """Write page `index` (0-based) to the board as the page that comes next, and restart the time limit."""
        self._board[self._slot] = index
        self.restart()

    def end(self) -> None:
        """End the piece of work: nothing is limited until the next one."""
        self._seconds = 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)


watch = Watch()
