"""Types for the end of a stage that was started here, and for the lines to print about it."""

import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass

from stages.contract.errors import Exit
from stages.contract.stop import STOPS

Lines = Generator[str, None, int | None]
"""Yields lines to print as they come; returns the exit code, where None means 0."""


class Note(str):
    """A line to print on standard error, which has progress and notes: standard output has results only."""

    __slots__ = ()


class Problem(Note):
    """A note on what is wrong."""

    __slots__ = ()


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    code: int
    """The exit code, as the stage's own process would have it."""
    problem: Problem | None = None
    """A line on how the stage ended, if it could not print one itself; else None."""


Runner = Callable[[str, list[str]], Outcome]
"""Runs one stage to its end, with additional arguments for its command."""


def signal_outcome(stage: str, number: int) -> Outcome:
    """The outcome of a stage that signal `number` ended: code 75 for a stop signal, else 1.

    A number that is no signal comes from a container's exit code above 128: also code 1.
    """
    if number not in signal.valid_signals():
        return Outcome(Exit.CRASHED, Problem(f"{stage}: exited with {128 + number}; see what it printed above"))
    name = signal.Signals(number).name
    code = Exit.INTERRUPTED if number in STOPS else Exit.CRASHED
    return Outcome(code, Problem(f"{stage}: ended by {name}; run the same command again to resume"))
