"""Exit codes, and the errors that carry them.

A `LorryError` is printed as one line, without a traceback. Its message says what was found, where, and what to do. Any
other exception that ends a command is a bug in Lorry: exit code 1, with the traceback.
"""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of a stage's process. Kubernetes' podFailurePolicy and `lorry launch` decide by them."""

    DONE = 0
    CRASHED = 1  # a bug in Lorry: the traceback is in the stage's log
    USAGE = 2  # the command or the recipe is wrong; also if a loss is not finite, which the settings cause
    DATA = 3  # the input data are unusable
    DOES_NOT_FIT = 4  # the job does not fit this hardware: memory, disk, kind of card
    INTERRUPTED = 75  # state is saved: run the same command again (EX_TEMPFAIL of sysexits.h)


class LorryError(Exception):
    """An error for the user: one line that says what was found, where, and what to do."""

    exit_code = Exit.CRASHED


class UsageError(LorryError):
    """The command, the recipe or a mount is wrong; the same command fails again."""

    exit_code = Exit.USAGE


class DataError(LorryError):
    """The input data are unusable."""

    exit_code = Exit.DATA


class DoesNotFitError(LorryError):
    """The job does not fit this machine's memory, disk or GPUs."""

    exit_code = Exit.DOES_NOT_FIT


class InterruptedRunError(LorryError):
    """The stage was asked to stop, or another process holds it. State is saved: run the same command again."""

    exit_code = Exit.INTERRUPTED
