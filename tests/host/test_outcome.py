"""How the end of a stage is reported."""

import signal

import pytest

from stages.contract.errors import Exit
from stages.host.outcome import Outcome, Problem, outcome_of_signal


@pytest.mark.parametrize(
    ("number", "code", "problem"),
    [
        (255 - 128, Exit.CRASHED, "train: exited with 255"),
        (signal.SIGKILL, Exit.CRASHED, "train: ended by SIGKILL; run the same command again to resume"),
        (signal.SIGTERM, Exit.INTERRUPTED, "train: ended by SIGTERM; run the same command again to resume"),
    ],
)
def test_the_signal_decides_code_and_line(number: int, code: Exit, problem: str) -> None:
    assert outcome_of_signal("train", number) == Outcome(code, Problem(problem))
