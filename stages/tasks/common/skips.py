"""Keeps what is skipped while data are read, to state the most common reason if nothing usable is left."""

from collections import Counter
from collections.abc import Mapping, Sequence

from stages.tasks.task import Skip


class Skips:
    """A `Skip` that passes each skip on to another one, and remembers it."""

    def __init__(self, skip: Skip) -> None:
        self._skip = skip
        self._seen: list[dict[str, str]] = []

    def __call__(self, what: str, reason: str, detail: str = "") -> None:
        """Remember the skip, and pass it on."""
        self._seen.append({"what": what, "reason": reason, "detail": detail})
        self._skip(what, reason, detail)

    @property
    def most_common(self) -> str | None:
        """The most common reason so far; None if nothing was skipped."""
        return Counter(one["reason"] for one in self._seen).most_common(1)[0][0] if self._seen else None

    @property
    def why(self) -> str:
        """`commonest_reason` of the records skipped so far."""
        return commonest_reason(self._seen)


def commonest_reason(skipped: Sequence[Mapping[str, str]]) -> str:
    """Why nothing usable is left, as the end of a message: how often the most common reason occurs among all skips, and
    the first record with that reason, with what was found there. If nothing was skipped, the text says that there is no
    record."""
    if not skipped:
        return "there is no record; put some there"
    reason, count = Counter(one["reason"] for one in skipped).most_common(1)[0]
    first = next(one for one in skipped if one["reason"] == reason)
    found = f" ({first['detail']})" if first["detail"] else ""
    return (
        f"{count} of {len(skipped)} skipped: {reason}, first {first['what']}{found}; correct them, the log has the"
        " reason of each"
    )
