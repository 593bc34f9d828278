"""The object that a stage's work gets its run from and reports its results to."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.contract.events import Events
from stages.contract.files import visible_files
from stages.contract.part import Part, Shard
from stages.contract.run import Run
from stages.contract.stop import StopRequest

NAMED = 1000
"""Skipped records or files that a manifest names per reason: data can have millions. The stage's log has all."""

LONGEST = 500
"""Characters of a skipped record's name or detail in a manifest, and of its line on the console."""

SHOWN = 3
"""Skipped records or files that the console shows if the stage ends with an error."""


@dataclass
class Stage:
    """One start of a stage: what its work gets, and what its work reports for the manifest."""

    run: Run
    name: str
    events: Events
    stop: StopRequest
    lock: int
    """File descriptor of the folder's lock, for children to inherit."""
    output: int
    """File descriptor of the real standard output, for results; `events.say` prints progress and notes."""
    part: Part = None
    """The shard or node that this process does; None: the whole stage."""
    key: str = ""
    """Digest (sha256, hex) of all that the result depends on."""
    starts: list[str] = field(default_factory=list)
    """Times (ISO 8601, UTC) of this start and of earlier starts of the same work."""
    forced: bool = False
    """Whether this work began with `--force`: it uses nothing that was made before."""
    finished_shards: list[Path] = field(default_factory=list)
    """Folders of finished shards, whose results the whole stage uses."""
    outputs: dict[str, int | None] = field(default_factory=dict)
    """Number of records, or None, of each output by its path in the stage's folder. A folder's path ends in `/`."""
    counts: Counter[str] = field(default_factory=Counter)
    """Numbers of records that were read, used and failed."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """One entry for each skipped record or file: `{"what", "reason", "detail"}`. The manifest has up to `NAMED` of each
    reason."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """Decisions for this machine: engine, precision, batch plan."""
    gpus: list[dict[str, Any]] = field(default_factory=list)
    """GPUs of the shards whose results the stage uses."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further keys of the manifest."""
    _cache_used: set[Path] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        """The folder that this process writes to."""
        return self.run.stage_folder(self.name, self.part)

    @property
    def shard(self) -> Shard | None:
        """The shard that this process does; None: the whole stage or a node."""
        return self.part if isinstance(self.part, Shard) else None

    def does_piece(self, number: int) -> bool:
        """Whether this process does piece `number` (0-based); a piece is a document, an adapter or a chunk.

        Always True if this process is not a shard.
        """
        return self.shard is None or number % self.shard.count == self.shard.index

    def has_nothing_to_do(self, pieces: int, unit: str) -> bool:
        """Whether this process is a shard that gets no piece, as the stage has only `pieces` of them.

        If so, prints a line; `unit` is the plural of a piece, such as `documents`.
        """
        if self.shard is None or self.shard.index < pieces:
            return False
        self.events.say(f"shard {self.shard} has nothing to do, as there are only {pieces} {unit}")
        return True

    def path(self, *parts: str) -> Path:
        """A path in the folder that this process writes to."""
        return self.folder.joinpath(*parts)

    def cache_file(self, *parts: str) -> Path:
        """The path of a file in the folder `cache`, which stays when inputs change. Also records that it is used.

        The caller checks that the file still matches its own input. `remove_unused_cache` deletes the files whose path
        this start did not ask for.
        """
        path = self.path("cache", *parts)
        self._cache_used.add(path)
        return path

    def remove_unused_cache(self) -> None:
        """Delete the files in the folder `cache` whose path this start did not get from `cache_file`."""
        for path in visible_files(self.path("cache")):
            if path not in self._cache_used:
                path.unlink()

    def skip(self, what: str, reason: str, detail: str = "") -> None:
        """Count a record or file, by its name `what`, as skipped for a reason, and write it to the log.

        Half a surrogate pair, which JSON may contain, is escaped: no file can hold it.
        """
        texts = (text.encode("utf-8", "backslashreplace").decode() for text in (what, reason, detail))
        self.skipped.append(dict(zip(("what", "reason", "detail"), texts, strict=True)))
        print(_skip_text(self.skipped[-1]))  # standard output is the log

    def show_first_skips(self) -> None:
        """Print the first skipped records or files on the console, and how many others there are.

        For a stage that ends with an error, which these may explain.
        """
        for one in self.skipped[:SHOWN]:
            self.events.say(" ".join(_skip_text(one).split())[:LONGEST])
        others = len(self.skipped) - SHOWN
        if others > 0:
            self.events.say(f"and {others} more; all are in {self.path('log.txt')}")

    def skipped_counts(self) -> dict[str, int]:
        """How many records or files are skipped for each reason."""
        return dict(Counter(one["reason"] for one in self.skipped))

    def named_skips(self) -> list[dict[str, str]]:
        """The first `NAMED` skipped records or files of each reason, with texts cut to `LONGEST` characters."""
        named: Counter[str] = Counter()
        found = []
        for one in self.skipped:
            named[one["reason"]] += 1
            if named[one["reason"]] <= NAMED:
                found.append({key: value[:LONGEST] for key, value in one.items()})
        return found

    def decide(self, what: str, value: Any, why: str) -> None:
        """Record a decision, with its reason, for the manifest and in events.jsonl, and print it."""
        self.decisions.append({"what": what, "value": value, "why": why})
        self.events.emit("decision", what=what, value=value, why=why)
        self.events.say(f"{what}: {value} ({why})")


def _skip_text(skipped: dict[str, str]) -> str:
    """An entry of `Stage.skipped` in words."""
    detail = f" ({skipped['detail']})" if skipped["detail"] else ""
    return f"skipped {skipped['what']}: {skipped['reason']}{detail}"
