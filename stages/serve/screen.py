"""Shows the answers to one prompt while they are written: side by side, or one after the other."""

import sys
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stages.contract.columns import terminal_width


class Screen(Protocol):
    """Where answers are shown. It is a context, which ends when all answers are whole."""

    def show(self, name: str, text: str, whole: bool) -> None:
        """Show the answer of a model so far; `whole`: nothing follows."""


class SideBySide:
    """Each answer in a column of its own, on a wide terminal. rich knows the widths of Chinese characters."""

    def __init__(self, names: list[str]) -> None:
        self._texts = dict.fromkeys(names, "")
        console = Console(file=sys.stdout, width=terminal_width(sys.stdout))
        self._live = Live(self._table(), console=console, auto_refresh=False)

    def __enter__(self) -> "SideBySide":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update(self._table(), refresh=True)
        self._live.stop()

    def show(self, name: str, text: str, whole: bool) -> None:
        """Show the answer of a model so far."""
        self._texts[name] = text
        self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        """The columns."""
        table = Table(box=None, expand=True, padding=(0, 1), pad_edge=False)
        for name in self._texts:
            table.add_column(name, ratio=1, overflow="fold", header_style="bold")
        table.add_row(*(Text(text) for text in self._texts.values()))
        return table


class Plain:
    """One answer after the other, each after its model's name: on a narrow terminal, in a pipe or in a file."""

    def __init__(self, streams: bool) -> None:
        """`streams`: answers are shown while they are written; if not, only when they are whole."""
        self._streams, self._begun, self._sent = streams, "", ""

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._begun:  # an answer that was dropped
            sys.stdout.write("\n")
        sys.stdout.flush()

    def show(self, name: str, text: str, whole: bool) -> None:
        """Print what is new of a model's answer."""
        if not (self._streams or whole):
            return
        if self._begun != name:
            sys.stdout.write(f"{name}: ")
            self._begun, self._sent = name, ""
        if text.startswith(self._sent):
            sys.stdout.write(text[len(self._sent) :])
            self._sent = text
        if whole:
            sys.stdout.write("\n")
            self._begun = ""
        sys.stdout.flush()
