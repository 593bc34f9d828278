"""Exit codes, and the errors that carry them.

A `LorryError` is shown to the user as one line, without a traceback. Its message says what was found,
where, and what to do. Anything else that escapes is a defect of ours and exits 1 with its traceback.
"""

from enum import IntEnum


class Exit(IntEnum):
    """What a stage's process exits with. Kubernetes' podFailurePolicy and the launcher decide by it."""

    DONE = 0
    CRASHED = 1  # a defect of ours: a traceback is in the stage's log
    USAGE = 2  # the command or the recipe is wrong
    DATA = 3  # the input data are unusable
    DOES_NOT_FIT = 4  # it cannot fit this hardware: memory, disk, no such card
    INTERRUPTED = 75  # state is saved: run the same command again (EX_TEMPFAIL of sysexits.h)


class LorryError(Exception):
    """An error whose message is for the user."""

    exit_code = Exit.CRASHED


class UsageError(LorryError):
    """The command, the recipe or a mount is wrong; running again unchanged cannot help."""

    exit_code = Exit.USAGE


class DataError(LorryError):
    """The input data cannot be used."""

    exit_code = Exit.DATA


class DoesNotFitError(LorryError):
    """The job cannot fit this machine's memory, disk or cards."""

    exit_code = Exit.DOES_NOT_FIT


class InterruptedRunError(LorryError):
    """The stage was asked to stop, or another process holds it. State is saved: run the same command again."""

    exit_code = Exit.INTERRUPTED
