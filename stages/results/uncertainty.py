"""Say in words how uncertain a figure is. This module needs no numpy, because the ledger also runs on hosts without
numpy.

stages/results/intervals.py describes the figures.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LEAST_GROUPS = 5
"""Smallest number of documents for an interval and a star."""

ROUGH_GROUPS = 10
"""With fewer documents, the interval is wide and depends on each document."""

LEVEL = 0.05
"""Two-sided significance level; intervals have a confidence of 1 - LEVEL."""


def is_clear(difference: Mapping[str, Any]) -> bool:
    """Whether a difference gets a star: its interval excludes 0, also after Holm's correction."""
    p = difference.get("p")
    return p is not None and p < LEVEL


def interval_text(value: float | None, low: float | None, high: float | None, sign: str = "", digits: int = 1) -> str:
    """A figure with its interval, such as `34.4 [25.0, 43.8]`, or `34.4 [too few]` without one; empty without a figure.

    `sign` is `+` for differences: `+34.4 [+25.0, +43.8]`. `digits` is the number of decimals.
    """
    if value is None:
        return ""
    form = f"{sign}.{digits}f"
    if low is None or high is None:
        return f"{value:{form}} [too few]"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def documents_note(groups: Iterable[int | None]) -> str | None:
    """A note such as `5 documents: intervals are rough`; None if all figures have enough documents. `groups` has the
    number of documents behind each figure."""
    counts = sorted({count for count in groups if count})
    few = [count for count in counts if count < LEAST_GROUPS]
    rough = [count for count in counts if LEAST_GROUPS <= count < ROUGH_GROUPS]
    notes = [f"{_document_range(few)}: too few for an interval, at least {LEAST_GROUPS} are needed"] if few else []
    notes += [f"{_document_range(rough)}: intervals are rough"] if rough else []
    return "; ".join(notes) or None


def outdated_note(run: str) -> str:
    """A note on a run that an older version of Lorry scored, whose figures do not count documents."""
    return f"{run}: intervals by the resampling of eval.bootstrap, too narrow with few documents; run eval again"


def _document_range(counts: Sequence[int]) -> str:
    """The range of sorted counts in words, such as `5 to 8 documents`."""
    ends = dict.fromkeys([counts[0], counts[-1]])
    return f"{' to '.join(map(str, ends))} document{'' if counts[-1] == 1 else 's'}"


def star_note(compared: int, what: str = "models") -> str:
    """A note that says what a star means. `compared` is the number of comparisons with the reference model, `what` the
    noun for what is compared."""
    correction = f" after Holm's correction for {compared} {what}" if compared > 1 else ""
    return f"*: the 95% interval excludes 0{correction and ', also'}{correction}"
