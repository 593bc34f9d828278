"""Stopping in order: SIGTERM or Ctrl-C asks, the stage saves at its next safe point and exits 75."""

import ctypes
import os
import signal
import subprocess
from types import FrameType

from stages.contract.errors import InterruptedRunError


class StopRequest:
    """Remembers that a stop was asked for. A second Ctrl-C does not wait for the safe point."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def install(self) -> None:
        """Listen to SIGTERM and SIGINT; must be called from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def pass_on_to(self, child: "subprocess.Popen[bytes]") -> None:
        """Send a stop to a child process too, at once: this one may be waiting for it."""
        self._child = child
        if self.signal is not None:
            child.send_signal(signal.SIGTERM)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is signal.Signals.SIGINT and number == signal.SIGINT and self._child is None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._child is not None and number == signal.SIGTERM:  # Ctrl-C reaches a child by itself
            self._child.send_signal(signal.SIGTERM)  # nothing happens to one that has ended

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
