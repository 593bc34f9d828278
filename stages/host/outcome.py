"""How a stage that was started here ended, and the lines to print about it."""

import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass

from stages.contract.errors import Exit

Lines = Generator[str, None, int | None]
"""Lines to print as they come, and at the end the exit code; None is 0."""


class Problem(str):
    """A line for standard error."""

    __slots__ = ()


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    code: int
    problem: Problem | None = None
    """What to print of it, where the stage itself could not."""


Runner = Callable[[str, list[str]], Outcome]
"""Runs one stage with some more arguments."""


def outcome_of_signal(stage: str, number: int) -> Outcome:
    """The outcome of a stage that a signal ended, by the signal's number."""
    if number not in signal.valid_signals():
        return Outcome(Exit.CRASHED, Problem(f"{stage}: exited with {128 + number}"))
    name = signal.Signals(number).name
    code = Exit.INTERRUPTED if name in ("SIGTERM", "SIGINT") else Exit.CRASHED
    return Outcome(code, Problem(f"{stage}: ended by {name}; run the same command again to resume"))
