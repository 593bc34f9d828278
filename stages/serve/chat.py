"""Chat with a run in the terminal: base and adapter answer each prompt, each in its own conversation."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stages.contract.columns import terminal_width
from stages.contract.errors import UsageError
from stages.contract.files import read_json
from stages.contract.records import BASE, Message, escape_places
from stages.contract.run import Run
from stages.engines.engine import Completion, StreamingEngine
from stages.models.reasoning import opened_reasoning
from stages.models.rendering import Prompt
from stages.serve.loading import Loaded, load_models
from stages.serve.screen import Plain, Screen, SideBySide
from stages.serve.served import Served, served_run, system_prompt

HELP = "/reset begins again, /adapter NAME asks another adapter, /quit ends; Ctrl-C stops an answer"

WIDE = 100
"""Columns of a terminal from which on two answers stand side by side."""


def chat(
    run: Run,
    adapter: str | None,
    only: str | None,
    system: str | None,
    engine: str | None,
    max_tokens: int,
    temperature: float,
) -> int:
    """Load base and adapters, and answer prompts until standard input ends. Returns the exit code.

    `adapter` None: the first one. `only` is `base` or `tuned`; None: both answer. `system` None: the commonest system
    message of the training samples. `engine` None: transformers, or the recipe's for a quantised base, for which
    transformers may lack kernels. Raises UsageError for an unknown adapter and what `served_run` refuses.
    """
    config = read_json(run.model(run.recipe.model.path, "model.path") / "config.json") or {}
    name = engine or (run.recipe.infer.engine if config.get("quantization_config") else "transformers")
    served = served_run(run, name, BASE if only == BASE else None, None, _say)
    tuned = [name for name in served.names if name != BASE]
    if adapter is not None and adapter not in tuned:
        raise UsageError(f"--adapter {adapter}: no such adapter in {run.folder}; known: {', '.join(tuned) or 'none'}")
    if only == "tuned" and not tuned:
        raise UsageError(f"--tuned-only: {run.folder} has no trained adapter; leave it out")
    models = load_models(served, _say)
    try:
        system = system_prompt(served) if system is None else system
        asked = {"base": [BASE], "tuned": [adapter or tuned[0]] if tuned else []}
        names = asked[only] if only else [BASE, *asked["tuned"]]
        settings = Settings(system or None, max_tokens, temperature)
        Chat(served, models, names, tuned, settings).run()
    finally:
        for loaded in {id(loaded): loaded for loaded, _ in models.values()}.values():
            loaded.close()
    return 0


@dataclass(frozen=True)
class Settings:
    """What every prompt has."""

    system: str | None
    max_tokens: int
    temperature: float


@dataclass
class Chat:
    """The conversations with the models `names`."""

    served: Served
    models: dict[str, Loaded]
    names: list[str]
    """The models that answer, base first."""
    tuned: list[str]
    """All adapters."""
    settings: Settings
    said: dict[str, list[Message]] = field(default_factory=dict)
    """Each model's own conversation, without the system message."""

    def run(self) -> None:
        """Answer prompts until standard input ends or /quit."""
        interactive = sys.stdin.isatty()
        if interactive:
            if self.settings.system:
                _say(f"system prompt: {self.settings.system}")
            _say(HELP)
        for line in _prompts(interactive):
            command, _, argument = line.strip().partition(" ")
            if command == "/quit":
                return
            if command == "/reset":
                self.said.clear()
                _say("a new conversation begins")
            elif command == "/adapter":
                self._change_adapter(argument.strip())
            elif command.startswith("/") and command[1:].isalpha() and interactive:
                _say(f"{command}: no such command; {HELP}")
            elif line.strip():
                self._answer(line)

    def _change_adapter(self, name: str) -> None:
        """Ask another adapter from now on."""
        if name not in self.tuned:
            _say(f"/adapter {name}: no such adapter; known: {', '.join(self.tuned) or 'none'}")
            return
        self.names = [*([BASE] if BASE in self.names else []), name]
        _say(f"{name} answers from now on")

    def _answer(self, text: str) -> None:
        """Show the answers of all models to a prompt."""
        prompts = {name: self._prompt(name, text) for name in self.names}
        tokens = max(prompt.length for prompt in prompts.values())
        if tokens >= self.served.max_length:
            _say(f"the conversation has {tokens} tokens, but at most {self.served.max_length} fit; /reset begins again")
            return
        with self._screen() as screen, _interrupted() as stopped:
            for name, prompt in prompts.items():
                if stopped.is_set():
                    break
                completion = self._complete(name, prompt, screen, stopped)
                self.said.setdefault(name, []).extend(
                    [_message("user", text), _message("assistant", completion.text)],
                )
                screen.show(name, completion.text, True)

    def _prompt(self, name: str, text: str) -> Prompt:
        """The prompt of a model: its conversation so far, and a new message of the user."""
        system = [_message("system", self.settings.system)] if self.settings.system else []
        messages = [*system, *self.said.get(name, []), _message("user", text)]
        prompt = self.served.renderer.render("chat", messages)
        room = max(self.served.max_length - prompt.length, 1)
        return replace(
            prompt,
            max_new_tokens=min(self.settings.max_tokens, room),
            temperature=self.settings.temperature,
            seed=self.served.run.recipe.seed + len(messages),
        )

    def _complete(self, name: str, prompt: Prompt, screen: Screen, stopped: threading.Event) -> Completion:
        """A model's answer, shown while it is written where the engine can do that."""
        engine, adapter = self.models[name]
        opened = opened_reasoning(self.served.renderer.tokenizer, prompt.tokens)

        def shown(_: int, text: str) -> bool:
            """Show the text so far. Returns whether the answer goes on."""
            screen.show(name, opened + text, False)
            return not stopped.is_set()

        if isinstance(engine, StreamingEngine):
            (found,) = engine.stream([prompt], adapter, shown)
        else:
            (found,) = engine.generate([prompt], adapter)
        return replace(found, text=opened + found.text)

    def _screen(self) -> Any:
        """Where the answers to one prompt are shown."""
        width = terminal_width(sys.stdout)
        if width is not None and width >= WIDE and len(self.names) > 1:
            return SideBySide(self.names)
        return Plain(streams=width is not None)


def _message(role: str, text: str) -> Message:
    """A message of a conversation. An `<image>` in it is text."""
    return {"role": role, "content": escape_places(text)}


def _prompts(interactive: bool) -> Iterator[str]:
    """Yield the lines of standard input; on a terminal, with a prompt and a history. Ctrl-C drops a line there."""
    if not interactive:
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with _history():
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                _say("Ctrl-D or /quit ends")


@contextmanager
def _history() -> Iterator[None]:
    """Let the arrow keys bring back earlier lines, also those of earlier chats."""
    import readline

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorry"
    file = folder / "chat_history"
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Within this context, Ctrl-C sets the event that this yields; a second one raises KeyboardInterrupt, which ends
    the context without an error."""
    stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        """Handle Ctrl-C."""
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    except KeyboardInterrupt:
        _say("the answer is dropped")
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    """Print a line about the chat, which is no answer."""
    print(f"chat: {line}", file=sys.stderr, flush=True)
