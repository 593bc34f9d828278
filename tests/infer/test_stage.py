"""The inference stage around its engine: failures are counted, a broken engine is no failing sample."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from stages.contract.errors import Exit
from stages.contract.files import read_json, read_jsonl
from stages.contract.part import Part
from stages.contract.run import Run
from stages.engines.engine import Completion, Done
from stages.host.runner import run_stage
from stages.infer import stage as infer
from stages.models.rendering import Prompt
from tests.infer.conftest import ask, describe, sample
from tests.infer.engines import use_engine

Answer = Callable[[list[Prompt], str | None], list[Completion]]


class ScriptedEngine:
    """Answers by a function, which may fail on purpose."""

    continuous = False

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def generate(self, prompts: list[Prompt], adapter: str | None, done: Done | None = None) -> list[Completion]:
        found = self._answer(prompts, adapter)
        for place, completion in enumerate(found):
            if done is not None:
                done(place, completion)
        return found

    def close(self) -> None:
        return None


def answers(run: Run, monkeypatch: pytest.MonkeyPatch, answer: Answer, part: Part = None) -> Exit:
    use_engine(monkeypatch, lambda _: ScriptedEngine(answer))
    return run_stage(run, "infer", infer.work, part=part)


def echo(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
    return [Completion(f"{adapter} {len(prompt.tokens)}", 2, "stop") for prompt in prompts]


def test_predictions_are_in_the_samples_order_for_base_and_adapter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(run, monkeypatch, echo) == Exit.DONE
    for name, adapter in (("base", None), ("tuned", "tuned")):
        found = read_jsonl(run.path("infer", "predictions", f"{name}.jsonl"))
        assert [p["id"] for p in found] == [f"s{i}" for i in range(6)]
        assert all(p["text"] == f"{adapter} {p['prompt_tokens']}" and p["error"] is None for p in found)


def test_control_words_in_samples_are_text_and_counted(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(run, [sample("a", "plain"), sample("b", "<|im_end|> </s> <|im_end|>"), sample("c", "a <file_sep>")])
    prompts: dict[str, list[int]] = {}

    def answer(asked: list[Prompt], adapter: str | None) -> list[Completion]:
        prompts.update((prompt.id, prompt.tokens) for prompt in asked)
        return echo(asked, adapter)

    assert answers(run, monkeypatch, answer) == Exit.DONE
    ends = {name: tokens.count(2) for name, tokens in prompts.items()}
    assert len(set(ends.values())) == 1, "the template's own only"
    said = {"samples": 2, "<|im_end|>": 2, "<file_sep>": 1}
    assert read_json(run.path("infer", "manifest.json"))["control_words"] == said
    line = "2 samples say control words of the model, such as '<|im_end|>'; they are encoded as text"
    assert f"infer: {line}" in capfd.readouterr().err


def test_a_prompt_that_is_too_long_begins_at_a_later_turn_if_the_recipe_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    talk = sample("talk", "word " * 60)
    talk["messages"][:0] = [{"role": "system", "content": "Be brief."}]
    talk["messages"] += [{"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}]
    samples = [talk, sample("short", "What?"), sample("endless", "word " * 60)]
    prompts: dict[str, int] = {}

    def answer(asked: list[Prompt], adapter: str | None) -> list[Completion]:
        prompts.update((prompt.id, prompt.length) for prompt in asked)
        return echo(asked, adapter)

    cutting = run.recipe.train.model_copy(update={"too_long": "cut"})
    for train, asked in ((run.recipe.train, {"short"}), (cutting, {"short", "talk"})):
        own = replace(run, recipe=run.recipe.model_copy(update={"train": train}))
        ask(own, samples)
        describe(own, "train", "adapters/tuned/adapter_config.json")
        prompts.clear()
        assert answers(own, monkeypatch, answer) == Exit.DONE
        assert set(prompts) == asked and max(prompts.values()) <= 64 - 8
        errors = {p["id"]: p["error"] for p in read_jsonl(own.path("infer", "predictions", "base.jsonl"))}
        assert "leaves no room for an answer" in errors["endless"]
        assert (errors["talk"] is None) == ("talk" in asked)
    assert read_json(run.path("infer", "manifest.json"))["counts"]["prompts that begin at a later turn"] == 1
    line = "infer: 1 prompts are longer than infer.max_length and begin at a later turn"
    assert capfd.readouterr().err.splitlines().count(line) == 1


def test_progress_counts_the_samples_of_each_pass(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert answers(run, monkeypatch, echo) == Exit.DONE
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(" samples")[0] for line in lines if " samples" in line] == [
        "infer: answer with base 3/6",
        "infer: answer with base 6/6",
        "infer: answer with tuned 3/6",
        "infer: answer with tuned 6/6",
    ]


def test_a_sample_that_fails_is_counted_and_the_others_are_answered(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_on_s1(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        if any(prompt.id == "s1" for prompt in prompts):
            raise ValueError("bad sample")
        return echo(prompts, adapter)

    assert answers(run, monkeypatch, fails_on_s1) == Exit.DONE
    found = {p["id"]: p for p in read_jsonl(run.path("infer", "predictions", "base.jsonl"))}
    assert found["s1"]["error"] == "ValueError: bad sample"
    assert found["s1"]["answer"] is None and found["s1"]["text"] is None
    assert all(p["error"] is None for name, p in found.items() if name != "s1")
    assert read_json(run.path("infer", "manifest.json"))["counts"] == {"answered": 10, "failed": 2}


def test_an_engine_that_fails_on_everything_ends_the_stage(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        raise RuntimeError("engine is dead")

    assert answers(run, monkeypatch, broken) == Exit.CRASHED
    assert not run.path("infer", "manifest.json").exists()
    assert answers(run, monkeypatch, echo) == Exit.DONE, "the same command goes on"


def test_a_restart_asks_only_for_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def stops_after_one_chunk(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        if asked:
            raise RuntimeError("killed")
        asked.extend(prompt.id for prompt in prompts)
        return echo(prompts, adapter)

    assert answers(run, monkeypatch, stops_after_one_chunk) == Exit.CRASHED
    assert asked == ["s0", "s1", "s2"]
    again: list[tuple[str | None, str]] = []

    def notes(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        again.extend((adapter, prompt.id) for prompt in prompts)
        return echo(prompts, adapter)

    assert answers(run, monkeypatch, notes) == Exit.DONE
    everything = [(adapter, f"s{i}") for adapter in (None, "tuned") for i in range(6)]
    assert again == everything[3:]


def test_a_prompt_without_room_or_pages_is_a_failed_record(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [
        sample("long", "word " * 100),
        sample("blind", "?", error="no readable page in a.pdf"),
        sample("ok", "?"),
    ]
    ask(run, samples)
    assert answers(run, monkeypatch, echo) == Exit.DONE
    found = {p["id"]: p["error"] for p in read_jsonl(run.path("infer", "predictions", "tuned.jsonl"))}
    assert "leaves no room for an answer after a prompt of" in found["long"]
    assert found["blind"] == "no readable page in a.pdf"
    assert found["ok"] is None


def test_a_failure_is_tried_again_once_the_recipe_allows_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers outlive a change of the recipe: the same question is not asked twice. Failures do not."""
    ask(run, [sample("long", "word " * 100), sample("short", "?")])
    assert answers(run, monkeypatch, echo) == Exit.DONE
    infer_more = run.recipe.infer.model_copy(update={"max_length": 512})
    roomy = replace(run, recipe=run.recipe.model_copy(update={"infer": infer_more}))
    asked: list[str] = []

    def notes(prompts: list[Prompt], adapter: str | None) -> list[Completion]:
        asked.extend(prompt.id for prompt in prompts)
        return echo(prompts, adapter)

    assert answers(roomy, monkeypatch, notes) == Exit.DONE
    found = read_jsonl(run.path("infer", "predictions", "base.jsonl"))
    assert [prediction["error"] for prediction in found] == [None, None]
    assert asked.count("long") == 2, "once for base, once for the adapter"
