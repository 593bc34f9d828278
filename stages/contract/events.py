"""Progress: each stage appends events to its `events.jsonl`; `lorry status` and the report read that file.

An event is `{"time": epoch seconds, "event": name, ...}`. Progress events have `step`, `total`, `unit` and, if known,
`loss`, `tokens_per_second`, `share_of_peak` (0..1, of the GPUs' peak speed), `memory` (bytes on one GPU) and
`eta_seconds`.
"""

import contextlib
import errno
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stages.contract.columns import cut_text, terminal_width, text_width
from stages.contract.files import JsonlJournal

CONSOLE_INTERVAL = 5.0
"""Seconds between progress lines when the console is not a terminal."""

EVENT_INTERVAL = 0.5
"""Seconds between progress events, so that a stage of a million records does not write a million lines."""

BAR_WIDTH = 24
"""Largest number of columns of the progress bar. Below a quarter of it, there is none."""

ACTIVITY_WIDTH = 24
"""Columns of an activity's name for which the figures make room."""


class Events:
    """Writes a stage's events to a file and shows its progress on the console."""

    def __init__(self, path: Path, stage: str, console: IO[str]) -> None:
        self._journal = JsonlJournal(path)
        self._stage = stage
        self._console = console
        self._terminal = console.isatty() and os.environ.get("TERM") != "dumb"
        self._activity = ""
        self._began = (0.0, 0)  # time and step at which this process began the activity
        self._emitted = self._shown = 0.0

    def emit(self, event: str, **fields: Any) -> None:
        """Append one event to the file, without the fields that are None."""
        known = {key: value for key, value in fields.items() if value is not None}
        self._journal.append([{"time": round(time.time(), 3), "event": event, **known}])
        self._journal.records.clear()  # a long run must not grow in memory; readers use the file

    def say(self, text: str) -> None:
        """Print one line on the console, prefixed with the stage."""
        self._clear_bar()
        print(f"{self._stage}: {text}", file=self._console, flush=True)

    def report_progress(self, activity: str, step: int, total: int, unit: str, **fields: Any) -> None:
        """Show progress on the console and write it to events.jsonl: `step` of `total` units of an activity are done.

        An activity is, for example, `render pages`. The first call and the last step of an activity always take effect.
        Other calls are written at most once per EVENT_INTERVAL, and shown at most once per CONSOLE_INTERVAL, or per 0.1
        s on a terminal. `fields` are further figures of the event, such as `loss`; those that are None are left out.
        """
        now = time.monotonic()
        if activity != self._activity:
            self._activity, self._began, self._emitted, self._shown = activity, (now, step), 0.0, 0.0
        last = step >= total
        elapsed, done = now - self._began[0], step - self._began[1]
        eta = round(elapsed / done * (total - step), 1) if done > 0 else None
        if last or now - self._emitted >= EVENT_INTERVAL:
            self.emit("progress", activity=activity, step=step, total=total, unit=unit, eta_seconds=eta, **fields)
            self._emitted = now
        if last or now - self._shown >= (0.1 if self._terminal else CONSOLE_INTERVAL):
            self._show_progress(activity, step, total, unit, eta, fields, last)
            self._shown = now

    def _show_progress(
        self, activity: str, step: int, total: int, unit: str, eta: float | None, fields: dict[str, Any], last: bool
    ) -> None:
        """Print progress as a line, or as a bar on a terminal. `eta` is in seconds; None: not known."""
        head, count = f"{self._stage}: {activity}", f"{step}/{total} {unit}"
        extras = field_texts(fields)
        left = [f"{duration_text(eta)} left"] if eta is not None and not last else []
        width = terminal_width(self._console) if self._terminal else None
        if width is None:
            print(f"{head} {'  '.join([count, *extras, *left])}", file=self._console, flush=True)
            return
        text = _bar_text(head, count, extras, left, step / max(total, 1), width - 1)  # a full line would wrap
        self._console.write(f"\r\x1b[2K{text}" + ("\n" if last else ""))
        self._console.flush()

    def _clear_bar(self) -> None:
        """Clear the terminal's line, which may show the bar."""
        if self._terminal:
            self._console.write("\r\x1b[2K")

    def close(self) -> None:
        """Clear the progress bar and close the file."""
        self._clear_bar()
        self._journal.close()


def say(stage: str, text: str) -> None:
    """Print one line about a stage on standard error, before the stage has its `Events`."""
    with _ignore_lost_console():
        print(f"{stage}: {text}", file=sys.stderr, flush=True)


def write_refusal(path: Path, error: str, exit_code: int) -> None:
    """Append the events of a start that ended with an error before its work, and so before it had its `Events`."""
    now = round(time.time(), 3)
    stopped = {"time": now, "event": "stopped", "error": error, "exit_code": exit_code}
    with JsonlJournal(path) as journal:
        journal.append([{"time": now, "event": "start"}, stopped, {"time": now, "event": "end"}])


def read_last_start(path: Path) -> list[dict[str, Any]]:
    """The events of a stage's last start, in order, from the last 64 KiB of an events.jsonl. Empty if there are none,
    or if the file cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65_536))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return []
    events: list[dict[str, Any]] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and {"event", "time"} <= event.keys():
                events = [event] if event["event"] == "start" else [*events, event]
    return events


class _Console(io.TextIOWrapper):
    """The console. What it cannot show any more is dropped: after a lost SSH connection the stage still has to save."""

    def write(self, text: str, /) -> int:
        """Write a text. Returns its length."""
        with _ignore_lost_console():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Show all that was written."""
        with _ignore_lost_console():
            super().flush()

    def close(self) -> None:
        """Show all that was written, and close the file."""
        with _ignore_lost_console():
            super().close()


@contextlib.contextmanager
def _ignore_lost_console() -> Iterator[None]:
    """Ignore the errors of a terminal or a pipe that is gone."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise


@contextlib.contextmanager
def redirect_output(log: Path) -> Iterator[tuple[IO[str], IO[str]]]:
    """Redirect the output of this process and its children to a log file. Yields the real console and the real output.

    The console is the former standard error, for progress and notes; the output is the former standard output, for
    results. Libraries print hundreds of lines, but the user needs the progress, and the log only if something breaks.
    """
    with (
        log.open("ab") as file,
        _Console(os.fdopen(os.dup(1), "wb"), encoding="utf-8") as output,
        _Console(os.fdopen(os.dup(2), "wb"), encoding="utf-8") as console,
        output_to(file.fileno()),
    ):
        yield console, output


@contextlib.contextmanager
def output_to(descriptor: int) -> Iterator[None]:
    """Within this context, the output of this process and its children, standard error too, goes to a file
    descriptor."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, real in enumerate(saved, start=1):
            os.dup2(real, number)
            os.close(real)


def _bar_text(head: str, count: str, extras: list[str], left: list[str], share: float, width: int) -> str:
    """One line of at most `width` columns: a bar of which `share` is full, an activity, and its figures.

    If there is no room for all, the bar gets shorter, then the last of `extras` go, then the activity's end.
    """
    extras = list(extras)
    room = width - min(text_width(head), ACTIVITY_WIDTH) - 1
    while extras and text_width("  ".join([count, *extras, *left])) > room:
        extras.pop()
    figures = "  ".join([count, *extras, *left])
    text = cut_text(f"{cut_text(head, max(width - text_width(figures) - 1, 1))} {figures}", width)
    bar = min(BAR_WIDTH, width - text_width(text) - 3)
    if bar < BAR_WIDTH // 4:
        return text
    filled = int(bar * min(share, 1))
    return f"[{'#' * filled}{'.' * (bar - filled)}] {text}"


def field_texts(fields: dict[str, Any]) -> list[str]:
    """The fields of a progress event as texts, without those that are None: `tokens_per_second`, `share_of_peak` and
    `memory` (in GiB) with units, others with names."""
    texts = []
    for key, value in fields.items():
        if value is None:
            continue
        if key == "tokens_per_second":
            texts.append(f"{value:,.0f} tokens/s")
        elif key == "share_of_peak":
            texts.append(f"{value:.0%} of peak")
        elif key == "memory":
            texts.append(f"{value / 1024**3:.1f} GiB")
        else:
            texts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return texts


def duration_text(seconds: float) -> str:
    """A duration in seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
