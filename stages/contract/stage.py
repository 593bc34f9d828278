"""What a stage's work gets, and what it returns for the manifest."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.contract.events import Events
from stages.contract.files import visible_files
from stages.contract.part import Part, Shard
from stages.contract.run import Run
from stages.contract.stop import StopRequest


@dataclass
class Stage:
    """What a stage's work gets, and what it returns for the manifest."""

    run: Run
    name: str
    events: Events
    stop: StopRequest
    lock: int
    """File descriptor of the folder's lock, for children to inherit."""
    console: int
    """File descriptor of the real console."""
    part: Part = None
    """The shard or node that this process does; None: the whole stage."""
    key: str = ""
    """Digest (sha256, hex) of all that the result depends on."""
    starts: list[str] = field(default_factory=list)
    """Times of this start and of earlier starts of the same work."""
    finished_shards: list[Path] = field(default_factory=list)
    """Folders of finished shards, whose results the whole stage takes over."""
    outputs: dict[str, int | None] = field(default_factory=dict)
    """Output files (or folders, ending in `/`), relative to the stage's folder, and their numbers of records."""
    counts: Counter[str] = field(default_factory=Counter)
    """Records read, used and failed."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Every skipped record or file: `{"what", "reason", "detail"}`."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """Decisions for this machine: engine, precision, batch plan."""
    gpus: list[dict[str, Any]] = field(default_factory=list)
    """GPUs of the other processes whose results are taken over."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Anything else that belongs in the manifest."""
    _cache_used: set[Path] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return self.run.stage_folder(self.name, self.part)

    @property
    def shard(self) -> Shard | None:
        return self.part if isinstance(self.part, Shard) else None

    def has(self, number: int) -> bool:
        """Whether this process does piece `number`, counted from 0: a document, adapter or chunk."""
        return self.shard is None or number % self.shard.count == self.shard.index

    def nothing_to_do(self, pieces: int, unit: str) -> bool:
        """Whether this shard has no piece to do, because there are fewer pieces than shards. Prints a line if so."""
        if self.shard is None or self.shard.index < pieces:
            return False
        self.events.say(f"shard {self.shard} has nothing to do: there are only {pieces} {unit}")
        return True

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def cache_file(self, *parts: str) -> Path:
        """A file that is kept when inputs change; its user checks that it matches. The stage deletes unused ones."""
        path = self.path("cache", *parts)
        self._cache_used.add(path)
        return path

    def remove_unused_cache(self) -> None:
        for path in visible_files(self.path("cache")):
            if path not in self._cache_used:
                path.unlink()

    def skip(self, what: str, reason: str, detail: str = "") -> None:
        """Count a record or file as skipped; the manifest names it."""
        self.skipped.append({"what": what, "reason": reason, "detail": detail})

    def decide(self, what: str, value: Any, why: str) -> None:
        """Record a decision, and print it."""
        self.decisions.append({"what": what, "value": value, "why": why})
        self.events.emit("decision", what=what, value=value, why=why)
        self.events.say(f"{what}: {value} ({why})")
