"""Stopping in order: SIGTERM or Ctrl-C asks, the stage saves at its next safe point and exits 75."""

import ctypes
import os
import signal
from types import FrameType

from stages.contract.errors import InterruptedRunError


class StopRequest:
    """Remembers that a stop was asked for. A second Ctrl-C does not wait for the safe point."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def install(self) -> None:
        """Listen to SIGTERM and SIGINT; must be called from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is signal.Signals.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def check(self) -> None:
        """Raise InterruptedRunError if a stop was asked for. Called where everything finished is saved."""
        if self.signal is not None:
            raise InterruptedRunError(
                f"stopped by {self.signal.name}; finished work is saved: run the same command again"
            )


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` (a process id) dies, so that a SIGKILL leaves no child (Linux).

    Without it a killed stage's children would go on writing into a run folder that the next start uses.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
