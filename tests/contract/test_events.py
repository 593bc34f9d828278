"""Progress on the console: a bar that stays on one line of a terminal, or a line now and then."""

import io
from pathlib import Path

import pytest
from rich.cells import cell_len

from stages.contract.events import Events
from tests.on_terminal import Terminal

FIGURES = {"loss": 1.23456, "tokens_per_second": 12345.6, "share_of_peak": 0.4567, "memory": 68 * 1024**3}

NAMES = ("tuned", "an-adapter-with-a-very-long-name-of-its-own", "名字很长的适配器" * 3)


def train(events: Events, name: str, steps: int = 30) -> None:
    for step in range(1, steps + 1):
        events.report_progress(f"train {name}", step, steps, "steps", **FIGURES)
        events._shown = 0.0  # each step is shown, as if it had taken a while
    events.close()


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("name", NAMES)
def test_the_bar_takes_one_line_of_a_terminal(tmp_path: Path, width: int, name: str) -> None:
    terminal = Terminal(width)
    with terminal.open() as console:
        train(Events(tmp_path / "events.jsonl", "train", console), name)
    shown = terminal.close().removesuffix("\r\x1b[2K")
    assert shown.count("\n") == 1 and shown.endswith("\n"), "only the last step ends its line"
    frames = shown.split("\r\x1b[2K")[1:]
    assert len(frames) == 30
    for step, frame in enumerate(frames, start=1):
        assert cell_len(frame.strip()) < width, "a full line wraps, and the next frame leaves it behind"
        assert f" {step}/30 steps" in frame
    assert "left" in frames[-2]
    if width == 200:
        assert (
            "[####" in frames[-2]
            and "loss 1.235  12,346 tokens/s  46% of peak  68.0 GiB" in frames[-2]
            and name in frames[-2]
        )


def test_a_terminal_that_tells_no_width_has_80_columns(tmp_path: Path) -> None:
    terminal = Terminal(0)
    with terminal.open() as console:
        train(Events(tmp_path / "events.jsonl", "train", console), NAMES[1])
    frames = terminal.close().split("\r\x1b[2K")
    assert max(cell_len(frame.strip()) for frame in frames) == 79


def test_a_file_gets_lines_without_a_bar(tmp_path: Path) -> None:
    console = io.StringIO()
    events = Events(tmp_path / "events.jsonl", "train", console)
    for step in range(1, 31):
        events.report_progress("train tuned", step, 30, "steps", **FIGURES)
    assert console.getvalue().splitlines() == [
        f"train: train tuned {step}/30 steps  loss 1.235  12,346 tokens/s  46% of peak  68.0 GiB" for step in (1, 30)
    ]
