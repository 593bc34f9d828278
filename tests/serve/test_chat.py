"""`lorry chat`: base and adapter answer, each in its own conversation; in a pipe, and on a terminal."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import pytest

from stages.contract.errors import UsageError
from stages.contract.run import Run
from stages.engines.engine import Completion, Shown
from stages.host.serving import chat_here
from stages.models.rendering import Prompt
from stages.serve.chat import Chat, Settings
from stages.serve.loading import Loaded
from stages.serve.screen import Plain, SideBySide
from stages.serve.served import Served
from tests.conftest import REPOSITORY
from tests.on_terminal import Terminal
from tests.serve.conftest import NAMES, SYSTEM
from tests.serve.test_servers import lorry_of

pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture
def converse(
    served: Served,
    models: dict[str, Loaded],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[str, str]]:
    """Chat through a pipe. Returns what is on standard output and on standard error."""

    def run(*lines: str, names: tuple[str, ...] = ("base", "formal")) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        Chat(served, models, list(names), NAMES[1:], Settings(SYSTEM, 6, 0.0)).run()
        output, errors = capsys.readouterr()
        return output, errors

    return run


@pytest.fixture
def answer(served: Served, models: dict[str, Loaded]) -> Callable[..., str]:
    """What infer's engine answers to a conversation of these texts, user first."""

    def complete(name: str, *texts: str, system: str = SYSTEM) -> str:
        said = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, texts, strict=False)]
        messages: Any = [{"role": "system", "content": system}, *said]
        engine, adapter = models[name]
        return engine.generate([served.renderer.render("x", messages, max_new_tokens=6)], adapter)[0].text

    return complete


def test_each_model_goes_on_with_its_own_conversation(converse: Any, answer: Any) -> None:
    asked = ("什么是阀？ <image> <|im_end|>", "And then?")
    wanted = ""
    first = {name: answer(name, asked[0]) for name in ("base", "formal")}
    for name in ("base", "formal"):
        wanted += f"{name}: {first[name]}\n"
    for name in ("base", "formal"):
        wanted += f"{name}: {answer(name, asked[0], first[name], asked[1])}\n"
    output, _ = converse(*asked)
    assert output == wanted
    assert first["base"] != first["formal"]
    again, _ = converse(asked[0], "/reset", asked[0])
    half = len(again) // 2
    assert again[:half] == again[half:]


def test_another_adapter_answers_from_now_on(converse: Any, answer: Any) -> None:
    output, errors = converse("/adapter other", "/adapter terse", "x", "/quit", "never asked", names=("formal",))
    assert output == f"terse: {answer('terse', 'x')}\n"
    assert "/adapter other: no such adapter; known: formal, terse" in errors


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    converse: Any, answer: Any, models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, whole = models["base"][0], answer("base", "x")
    write = engine.stream

    def stream(prompts: list[Prompt], adapter: str | None, shown: Shown) -> list[Completion]:
        """Press Ctrl-C at the first word of the first prompt."""
        if stopped:
            return write(prompts, adapter, shown)
        stopped.append(True)

        def press(place: int, text: str) -> bool:
            signal.raise_signal(signal.SIGINT)
            return shown(place, text)

        return write(prompts, adapter, press)

    stopped: list[bool] = []
    monkeypatch.setattr(engine, "stream", stream)
    output = converse("x", "/reset", "x", names=("base", "formal"))[0]
    again = f"base: {whole}\nformal: {answer('formal', 'x')}\n"
    assert output.endswith(again)
    first = output.removesuffix(again)
    parts = [f"base: {whole[:length]}\n" for length in range(1, len(whole))]
    assert first in parts, "nobody else is asked after Ctrl-C"


def test_a_conversation_that_is_too_long_is_not_asked(converse: Any) -> None:
    output, errors = converse("word " * 600, "x", names=("base",))
    assert re.search(r"the conversation has \d+ tokens, but at most 512 fit; /reset begins again", errors)
    assert output.count("base: ") == 1


def test_the_command_asks_whom_its_options_name(
    answer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"engine": None, "max_tokens": 6, "temperature": 0.0}
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    assert chat_here("job", adapter="terse", only="tuned", system="Sing.", **options) == 0
    assert capsys.readouterr().out == f"terse: {answer('terse', 'x', system='Sing.')}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    assert chat_here("job", adapter=None, only="base", system=None, **options) == 0
    assert capsys.readouterr().out == f"base: {answer('base', 'x')}\n"
    with pytest.raises(UsageError, match="--adapter other: no such adapter"):
        chat_here("job", adapter="other", only=None, system=None, **options)


def test_two_columns_with_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(40)
    with terminal.open() as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        with SideBySide(["base", "tuned"]) as screen:
            for text in ("阀门", "阀门" * 12):
                screen.show("base", text, True)
            screen.show("tuned", "a [bold]valve", True)
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", terminal.close()).split("base")
    assert [line.rstrip() for line in f"base{frames[-1]}".splitlines()] == [
        f"{'base':21}tuned",
        f"{'阀门阀门阀门阀门阀'}   a [bold]valve",
        "门阀门阀门阀门阀门",
        "阀门阀门阀门",
    ]


def test_an_answer_that_streams_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    for streams in (True, False):
        with Plain(streams) as screen:
            for text in ("o", "one", "one two"):
                screen.show("base", text, False)
            screen.show("base", "one two", True)
            screen.show("tuned", "three\nfour", True)
        assert capsys.readouterr().out == "base: one two\ntuned: three\nfour\n"


class Shell:
    """`lorry chat` on a pseudo-terminal."""

    def __init__(self, run: Run, width: int, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        environment = {**lorry_of(run).environment, "XDG_CACHE_HOME": str(run.roots.data), "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "entrypoints.lorry", "chat", run.name, *arguments],
            cwd=REPOSITORY, env=environment, stdin=slave, stdout=slave, stderr=slave,
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),  # noqa: PLW1509 - no other thread runs
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, text: str, seconds: float = 90) -> str:
        """Read until a text comes. Returns what came since the last call."""
        end, before = time.monotonic() + seconds, len(self.seen)
        while text not in self.seen[before:]:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.seen += re.sub(
                        r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", os.read(self.master, 65536).decode(errors="replace")
                    )
                except OSError as error:
                    raise AssertionError(self.seen) from error
        return self.seen[before:]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.mark.long
def test_on_a_terminal(tuned: Run) -> None:
    terminal = Shell(tuned, 120, "--max-tokens", "400", "--target", "cpu")
    try:
        assert f"system prompt: {SYSTEM}" in terminal.until("> ")
        terminal.type("什么是阀？\n")
        terminal.until("formal")
        time.sleep(0.3)
        terminal.type("\x03")  # Ctrl-C stops the answer
        terminal.until("> ")
        terminal.type("\x03")
        terminal.until("Ctrl-D or /quit ends")
        terminal.type("/reset\n")
        terminal.until("a new conversation begins\n> ")  # both may come at once
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0, terminal.seen
        history = tuned.roots.data / "lorry" / "chat_history"
        assert history.read_text().splitlines() == ["什么是阀？", "/reset"]
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGKILL)
        os.close(terminal.master)
