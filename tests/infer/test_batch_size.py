"""`infer.batch_size: auto`: found once for all starts of the same work."""

from dataclasses import replace
from typing import Any

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json, read_jsonl, write_json
from stages.contract.run import Run
from stages.engines.engine import Completion
from stages.host.runner import run_stage
from stages.infer import stage as infer
from stages.models.rendering import Prompt
from tests.infer.conftest import ask, sample
from tests.infer.engines import use_engine
from tests.infer.test_stage import Answer, ScriptedEngine, echo


class Searching(ScriptedEngine):
    """Finds 4, and notes which prompts it was to try."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.tried: list[list[Prompt]] = []

    def find_batch_size(self, prompts: list[Prompt]) -> tuple[int, str]:
        self.tried.append(prompts)
        return 4, "8 ran out of memory"


@pytest.fixture
def run(run: Run) -> Run:
    changed = run.recipe.infer.model_copy(update={"batch_size": "auto"})
    return replace(run, recipe=run.recipe.model_copy(update={"infer": changed}))


def infers(run: Run, monkeypatch: pytest.MonkeyPatch, answer: Answer = echo) -> tuple[Exit, Searching]:
    engine = Searching(answer)
    use_engine(monkeypatch, lambda _: engine)
    return run_stage(run, "infer", infer.work), engine


def decided(run: Run) -> list[Any]:
    decisions = read_json(run.path("infer", "manifest.json"))["decisions"]
    return [(made["value"], made["why"]) for made in decisions if made["what"] == "batch size"]


def test_the_longest_prompts_are_tried_and_the_size_is_recorded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, engine = infers(run, monkeypatch)
    assert code == Exit.DONE
    (tried,) = engine.tried
    assert [prompt.id for prompt in tried] == [f"s{n}" for n in reversed(range(6))], "the longest first"
    assert decided(run) == [(4, "8 ran out of memory")]


def test_a_later_start_does_not_try_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def dies(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        calls.append(len(prompts))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return echo(prompts, adapter)

    code, engine = infers(run, monkeypatch, dies)
    assert (code, len(engine.tried)) == (Exit.INTERRUPTED, 1)
    code, engine = infers(run, monkeypatch)
    assert (code, len(engine.tried)) == (Exit.DONE, 0), "the same samples are batched together"
    assert decided(run) == [(4, "8 ran out of memory")]


def test_nothing_is_tried_if_every_prompt_is_too_long(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(run, [sample(f"long{n}", "word " * 100) for n in range(3)])
    monkeypatch.setenv("LORRY_TARGET", "cpu")
    assert run_stage(without_adapter(run), "infer", infer.work) == Exit.DONE, capfd.readouterr().err
    rows = read_jsonl(run.path("infer", "predictions", "base.jsonl"))
    assert all("leaves no room for an answer after a prompt of" in row["error"] for row in rows)


def without_adapter(run: Run) -> Run:
    """The run, for the real engine: the adapter of the fixture has no weights."""
    manifest = run.path("train", "manifest.json")
    write_json(manifest, {**read_json(manifest), "outputs": {}, "untrained": {"tuned": "it has no weights"}})
    return run
