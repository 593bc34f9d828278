"""How large a batch is: found by trying, and halved where memory does not suffice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.engines import batch_size
from stages.engines.batch_size import MOST, best_batch_size
from stages.engines.engine import EngineSettings
from stages.models.rendering import Prompt, Renderer

GIB = 1024**3


class Machine:
    """A machine on whose clock an attempt takes what `seconds` says, with memory for `fits` sequences."""

    def __init__(self, seconds: Callable[[int], float], fits: int = 10**6, each: int = 0) -> None:
        self.now, self.each = 0.0, each
        self.tried: list[int] = []
        self._seconds, self._fits = seconds, fits

    def attempt(self, size: int) -> None:
        self.tried.append(size)
        if size > self._fits:
            raise torch.OutOfMemoryError(f"{size} do not fit")
        self.now += self._seconds(size)


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Looks for the batch size on a machine."""

    def searched(machine: Machine, most: int = MOST) -> tuple[int, str]:
        monkeypatch.setattr(batch_size, "time", SimpleNamespace(perf_counter=lambda: machine.now))
        monkeypatch.setattr(batch_size, "_free_caches", lambda: None)  # this process has nothing to forget
        monkeypatch.setattr(batch_size, "_free_memory", lambda: 10 * GIB)
        monkeypatch.setattr(batch_size, "_peak_memory", lambda before: machine.tried[-1] * machine.each)
        return best_batch_size(machine.attempt, most)

    return searched


# -- the search ----------------------------------------------------------------------------------------------------


def test_sizes_double_while_that_is_faster(search: Any) -> None:
    machine = Machine(lambda size: 1.0 + max(0, size - 8))  # up to 8 at once for the price of one
    assert search(machine) == (8, "larger ones were not faster")
    assert machine.tried == [1, 1, 2, 4, 8, 16], "the first attempt is not counted"


def test_a_slightly_faster_size_is_not_used(search: Any) -> None:
    assert search(Machine(lambda size: size**0.95))[0] == 1, "doubling gains 3.5 percent"
    assert search(Machine(lambda size: size**0.80), most=64)[0] == 64, "doubling gains 15 percent"


def test_the_first_attempt_may_be_slow(search: Any) -> None:
    machine = Machine(lambda size: 100.0 if len(machine.tried) == 1 else 1.0)
    assert search(machine, most=4) == (4, "larger than 4 is not tried")


def test_the_search_stops_when_memory_runs_out(search: Any) -> None:
    machine = Machine(lambda size: 1.0, fits=11)
    assert search(machine) == (8, "16 ran out of memory")
    assert machine.tried[-1] == 16, "and is not tried again"


def test_it_stops_before_memory_would_run_out(search: Any) -> None:
    machine = Machine(lambda size: 1.0, each=GIB)
    assert search(machine) == (4, "8 would take more than 70% of the free memory")
    assert machine.tried == [1, 1, 2, 4]


def test_the_search_ends_at_the_largest_size(search: Any) -> None:
    assert search(Machine(lambda size: 1.0))[0] == MOST
    assert search(Machine(lambda size: 1.0), most=6)[0] == 4
    assert search(Machine(lambda size: 1.0), most=2)[0] == 2


def test_out_of_memory_with_one_sequence_is_an_error(search: Any) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        search(Machine(lambda size: 1.0, fits=0))


def test_another_error_ends_the_search(search: Any) -> None:
    def broken(size: int) -> float:
        raise RuntimeError("a kernel failed")

    with pytest.raises(RuntimeError, match="a kernel failed"):
        search(Machine(broken))


# -- the engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(small_models: Path) -> Path:
    return small_models / "random-llama"


def new_engine(model: Path, size: int | None = 4) -> Any:
    from stages.engines.transformers_engine import TransformersEngine

    return TransformersEngine(EngineSettings(model, {}, "float32", 10, size, 256, 0))


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[Prompt]:
    """Seven, of which two are sampled."""
    renderer = Renderer(model)
    made = [renderer.render(str(n), [{"role": "user", "content": "What is it? " * n}]) for n in range(1, 8)]
    return [replace(prompt, temperature=0.8, seed=5) if prompt.id in "36" else prompt for prompt in made]


def with_memory_for(engine: Any, most: int) -> list[int]:
    """Have an engine run out of memory beyond so many; returns the sizes of the batches that it tries."""
    inner, tried = engine._complete_batch, []

    def batch(prompts: list[Prompt], adapter: str | None) -> Any:
        tried.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError(f"{len(prompts)} do not fit")
        return inner(prompts, adapter)

    engine._complete_batch = batch
    return tried


@pytest.mark.parametrize(("most", "tried"), [(6, [7, 3, 4]), (2, [7, 3, 1, 2, 4, 2, 2])])
def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_answers(
    model: Path, prompts: list[Prompt], most: int, tried: list[int]
) -> None:
    whole = new_engine(model, size=8).generate(prompts, None)
    engine = new_engine(model, size=8)
    found = with_memory_for(engine, most)
    done: list[int] = []
    assert engine.generate(prompts, None, lambda place, completion: done.append(place)) == whole
    assert found == tried
    assert sorted(done) == list(range(7)), "each is reported once"


def test_one_prompt_that_does_not_fit_is_an_error(model: Path, prompts: list[Prompt]) -> None:
    engine = new_engine(model)
    tried = with_memory_for(engine, 0)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(prompts, None)
    assert tried == [4, 2, 1]


def test_the_engine_tries_its_longest_prompts_with_short_answers_and_keeps_the_size(
    model: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(model, size=None)
    tried: list[list[Prompt]] = []
    monkeypatch.setattr(engine, "_complete_batch", lambda prompts, adapter: tried.append(prompts))
    monkeypatch.setattr(batch_size, "_peak_memory", lambda before: 0)
    long = [replace(prompt, max_new_tokens=500) for prompt in prompts[:3]]
    found, why = engine.find_batch_size(long)
    assert engine.batch_size == found >= 1 and why
    assert {prompt.max_new_tokens for batch in tried for prompt in batch} == {16}
    assert max(map(len, tried)) <= 6, "twice as many as there are: a larger batch never comes"
    assert [prompt.id for prompt in tried[0]] == [long[0].id]


def test_a_real_search_ends_and_the_engine_still_answers(model: Path, prompts: list[Prompt]) -> None:
    expected = new_engine(model, size=4).generate(prompts, None)
    engine = new_engine(model, size=None)
    found, _ = engine.find_batch_size([replace(prompt, max_new_tokens=2) for prompt in prompts[:2]])
    assert found in (1, 2, 4)
    assert engine.generate(prompts, None) == expected


def test_without_a_prompt_there_is_nothing_to_try(model: Path) -> None:
    engine = new_engine(model, size=None)
    assert engine.find_batch_size([]) == (1, "no prompt to try")
    assert engine.batch_size == 1
