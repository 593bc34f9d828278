"""How the end of a stage is reported."""

import signal

import pytest

from stages.contract.errors import Exit
from stages.host.outcome import Outcome, Problem, signal_outcome


@pytest.mark.parametrize(
    ("number", "code", "problem"),
    [
        (255 - 128, Exit.CRASHED, "train: exited with 255; see what it printed above"),
        (signal.SIGKILL, Exit.CRASHED, "train: ended by SIGKILL; run the same command again to resume"),
        (signal.SIGTERM, Exit.INTERRUPTED, "train: ended by SIGTERM; run the same command again to resume"),
        (signal.SIGHUP, Exit.INTERRUPTED, "train: ended by SIGHUP; run the same command again to resume"),
    ],
)
def test_the_signal_decides_code_and_line(number: int, code: Exit, problem: str) -> None:
    assert signal_outcome("train", number) == Outcome(code, Problem(problem))
