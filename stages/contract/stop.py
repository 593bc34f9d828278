"""Stops a stage cleanly: after SIGTERM, SIGHUP or Ctrl-C it saves what is in progress and exits with 75.

Every process that Lorry starts is in a process group of its own, so that the terminal's Ctrl-C reaches only the command
that the user started. That one passes it on to its child, and the child to its own.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

from stages.contract.errors import InterruptedRunError

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that ask to stop. A lost SSH connection sends SIGHUP."""


class Child(Protocol):
    """One or several child processes that take signals, such as a `subprocess.Popen`."""

    def send_signal(self, sig: int, /) -> None:
        """Send signal number `sig` to each process."""


class StopRequest:
    """Records that a signal asks this process to stop.

    While there is nothing to save, the signal ends the process at once: it raises KeyboardInterrupt in the main thread.
    A second Ctrl-C always does. All finished work is on the disk at any time, and child processes die with this one.
    """

    def __init__(self, waits: Callable[[], bool] = lambda: False) -> None:
        """`waits` returns whether a stop has to wait for `check` now; `waiting` changes this."""
        self.signal: signal.Signals | None = None
        """The first stop signal; None: not asked to stop."""
        self._waits = waits
        self._child: Child | None = None
        self._child_ends_itself = self._ends = False
        self._notice: tuple[int, str] | None = None

    def install(self) -> None:
        """Handle the stop signals from now on. Call it from the main thread.

        SIGHUP stays ignored if it is, as by nohup. Signals that `begin_child` held back arrive now.
        """
        for number in STOPS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    @contextmanager
    def waiting(self, waits: bool) -> Iterator[None]:
        """Within this context, a stop waits for `check`; if `waits` is false, it ends this process at once."""
        before, self._waits = self._waits, lambda: waits
        try:
            yield
        finally:
            self._waits = before

    def notify(self, descriptor: int, text: str) -> None:
        """Write a line to this file as soon as a stop has to wait; `text` says what is saved first."""
        self._notice = descriptor, text

    def pass_on_to(self, child: Child | None, ends_itself: bool = False) -> None:
        """Pass stop signals on to the child at once, as this process may be waiting for it; None: no longer.

        A second Ctrl-C raises KeyboardInterrupt here, and the child dies with this process. With `ends_itself`, the
        child gets it too, and this process goes on waiting for the child. If a signal came before this call, the child
        gets it now.
        """
        self._child, self._child_ends_itself = child, ends_itself
        if self.signal is not None and child is not None:
            child.send_signal(self.signal)

    def _handle_signal(self, number: int, _frame: FrameType | None) -> None:
        """Note the first signal and pass it on; or raise KeyboardInterrupt, once, if nothing has to be saved or after a
        second Ctrl-C."""
        first = self.signal is None
        self.signal = self.signal or signal.Signals(number)
        if self._ends or not (first or number == signal.SIGINT):
            return
        if self._child is not None and (first or self._child_ends_itself):
            self._child.send_signal(number)  # no effect on a child that has ended
        elif not first or not self._waits():
            self._ends = True
            raise KeyboardInterrupt
        if first:
            self._write_notice()

    def _write_notice(self) -> None:
        """Write the line of `notify`, without Python's buffers: a handler may interrupt another line."""
        if self._notice is None or self.signal is None:
            return
        descriptor, text = self._notice
        again = "; press Ctrl-C again to stop at once" if self.signal == signal.SIGINT else ""
        with suppress(OSError):  # the terminal may be gone
            clear = "\r\x1b[2K" if os.isatty(descriptor) else ""
            os.write(descriptor, f"{clear}{text} ({self.signal.name}){again}\n".encode())

    def error(self) -> InterruptedRunError:
        """The error that ends a process that was asked to stop."""
        name = self.signal.name if self.signal is not None else signal.SIGINT.name
        return InterruptedRunError(f"stopped by {name} after saving finished work; run the same command again")

    def check(self) -> None:
        """Raise InterruptedRunError if this process was asked to stop. Call it where all finished work is saved."""
        if self.signal is not None:
            raise self.error()


def begin_child(parent: int) -> None:
    """Prepare a new process that will call `StopRequest.install`: it dies with its parent, and stop signals wait until
    it handles them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    die_with_parent(parent)


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
