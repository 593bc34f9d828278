"""Stops a stage cleanly: after SIGTERM or Ctrl-C it saves its state at the next safe point and exits with 75."""

import ctypes
import os
import signal
from types import FrameType
from typing import Protocol

from stages.contract.errors import InterruptedRunError


class Child(Protocol):
    """One or several child processes that take signals, such as a `subprocess.Popen`."""

    def send_signal(self, sig: int, /) -> None:
        """Send signal number `sig` to each process."""


class StopRequest:
    """Records that SIGTERM or Ctrl-C asks this process to stop.

    A second Ctrl-C stops it at once, unless it passes signals on to a child.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._child: Child | None = None
        self._hears_ctrl_c = True

    def install(self) -> None:
        """Handle SIGTERM and SIGINT from now on. Call it from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle_signal)

    def pass_on_to(self, child: Child, hears_ctrl_c: bool = True) -> None:
        """Pass each stop signal on to the child at once, as this process may be waiting for the child.

        `hears_ctrl_c` says whether the terminal's Ctrl-C reaches the child directly, so that it is not passed on; a
        child in another session does not hear it. If a signal came before this call, the child gets SIGTERM now.
        """
        self._child, self._hears_ctrl_c = child, hears_ctrl_c
        if self.signal is not None:
            child.send_signal(signal.SIGTERM)

    def _handle_signal(self, number: int, _frame: FrameType | None) -> None:
        """Note the signal, and pass it on to the child, unless the terminal sent it to the child too.

        A second Ctrl-C without a child raises KeyboardInterrupt.
        """
        if self.signal is signal.Signals.SIGINT and number == signal.SIGINT and self._child is None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._child is not None and (number == signal.SIGTERM or not self._hears_ctrl_c):
            self._child.send_signal(number)  # no effect on a child that has ended

    def check(self) -> None:
        """Raise InterruptedRunError if this process was asked to stop. Call it where all finished work is saved."""
        if self.signal is not None:
            raise InterruptedRunError(
                f"stopped by {self.signal.name} after saving finished work; run the same command again"
            )


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent, with process id `parent`, dies (prctl(2), Linux).

    Exits with code 1 if the parent has died already. Without this, the children of a killed stage would write into a
    run folder that the next start uses.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def make_forks_die_with_parents() -> None:
    """Make each process that is forked from now on die with its parent, also the forks of forks.

    Otherwise the workers of a library would wait for ever for a killed parent, and hold the stage's lock.
    """
    parent = [os.getpid()]
    os.register_at_fork(
        before=lambda: parent.__setitem__(0, os.getpid()), after_in_child=lambda: die_with_parent(parent[0])
    )
