"""Sampled answers: the prompt's own seed decides, whatever is computed beside it, and draws follow the softmax."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.engines.engine import EngineSettings
from stages.models.rendering import Prompt, Renderer

TEXTS = ("What is part 12?", "部件3在哪里？", "A longer question about a lever, a spring and a valve.", "?")


@pytest.fixture(scope="module")
def engine(small_models: Path) -> Any:
    from stages.engines.transformers_engine import TransformersEngine

    return TransformersEngine(EngineSettings(small_models / "random-llama", {}, "float32", 12, 4, 256, 0))


@pytest.fixture(scope="module")
def prompts(small_models: Path) -> list[Prompt]:
    """Greedy ones."""
    renderer = Renderer(small_models / "random-llama")
    return [renderer.render(text, [{"role": "user", "content": text}]) for text in TEXTS]


def sampled(prompt: Prompt, seed: int, temperature: float = 0.8) -> Prompt:
    return replace(prompt, temperature=temperature, seed=seed)


def texts(engine: Any, prompts: Sequence[Prompt]) -> list[str]:
    return [completion.text for completion in engine.generate(list(prompts), None)]


# -- seeds ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(engine: Any, prompts: list[Prompt]) -> None:
    first, *others = prompts
    (alone,) = texts(engine, [sampled(first, 7)])
    beside = [
        [sampled(first, 7), *others],
        [*others, sampled(first, 7)],
        [*(sampled(other, 7) for other in others), sampled(first, 7)],
        [sampled(first, 8), sampled(first, 7)],
    ]
    for batch in beside:
        assert texts(engine, batch)[batch.index(sampled(first, 7))] == alone
    assert len(alone) > 0


def test_another_seed_gives_another_text(engine: Any, prompts: list[Prompt]) -> None:
    drawn = texts(engine, [sampled(prompts[0], seed) for seed in range(8)])
    assert len(set(drawn)) == 8
    (greedy,) = texts(engine, [prompts[0]])
    assert greedy not in drawn


def test_a_temperature_near_zero_is_greedy(engine: Any, prompts: list[Prompt]) -> None:
    assert texts(engine, [sampled(prompt, 3, temperature=1e-6) for prompt in prompts]) == texts(engine, prompts)


def test_greedy_rows_beside_sampled_ones_stay_greedy(engine: Any, prompts: list[Prompt]) -> None:
    greedy = texts(engine, prompts)
    assert texts(engine, prompts) == greedy, "twice the same"
    mixed = [prompts[0], sampled(prompts[1], 1), prompts[2], sampled(prompts[3], 2)]
    found = texts(engine, mixed)
    assert (found[0], found[2]) == (greedy[0], greedy[2])
    assert found[1] != greedy[1] and found[3] != greedy[3]


def test_torchs_own_random_state_is_neither_used_nor_changed(engine: Any, prompts: list[Prompt]) -> None:
    import torch

    torch.manual_seed(1)
    first = texts(engine, [sampled(prompts[0], 5)])
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert texts(engine, [sampled(prompts[0], 5)]) == first
    assert torch.equal(torch.get_rng_state(), before)


# -- the draw ------------------------------------------------------------------------------------------------------

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -4.0]
DRAWS = 6000
CRITICAL = 25.74
"""Of chi-square with five degrees of freedom: one in ten thousand is beyond. Seeds are fixed: it is always the same."""


def chi_square(drawn: Any, temperature: float) -> float:
    import torch

    expected = torch.softmax(torch.tensor(LOGITS, dtype=torch.float64) / temperature, 0) * len(drawn)
    counts = torch.bincount(drawn, minlength=len(LOGITS)).double()
    return float(((counts - expected) ** 2 / expected).sum())


def sampling(*prompts: Prompt) -> Any:
    from stages.engines.transformers_engine import _Sampling

    return _Sampling(list(prompts))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_first_tokens_of_many_seeds_follow_the_softmax(temperature: float) -> None:
    """Seeds that follow each other, as those of samples may."""
    import torch

    prompts = [Prompt("x", [1], temperature=temperature, seed=seed) for seed in range(DRAWS)]
    drawn = sampling(*prompts)(None, torch.tensor(LOGITS).repeat(DRAWS, 1)).argmax(dim=1)
    assert chi_square(drawn, temperature) < CRITICAL
    assert chi_square(drawn, 1.3 * temperature) > CRITICAL, "the test would see another temperature"


def test_the_tokens_of_one_answer_follow_the_softmax_independently() -> None:
    import torch

    draw = sampling(Prompt("x", [1], temperature=1.0, seed=11))
    drawn = torch.cat([draw(None, torch.tensor([LOGITS])).argmax(dim=1) for _ in range(DRAWS)])
    assert chi_square(drawn, 1.0) < CRITICAL
    after_a_first = drawn[1:][drawn[:-1] == 0]
    assert chi_square(after_a_first, 1.0) < CRITICAL, "what comes after the first token is no other"


def test_greedy_rows_keep_their_scores() -> None:
    import torch

    scores = torch.tensor([LOGITS, LOGITS, LOGITS])
    greedy, drawn = Prompt("g", [1]), Prompt("d", [1], temperature=1.0, seed=1)
    found = sampling(greedy, drawn, greedy)(None, scores.clone())
    assert torch.equal(found[0], scores[0]) and torch.equal(found[2], scores[2])
    assert not torch.equal(found[1], scores[1]) and torch.isfinite(found).all()


def test_a_token_of_probability_zero_is_never_sampled() -> None:
    import torch

    scores = torch.tensor([[0.0, float("-inf"), 0.0]]).repeat(500, 1)
    prompts = [Prompt("x", [1], temperature=5.0, seed=seed) for seed in range(500)]
    assert set(sampling(*prompts)(None, scores).argmax(dim=1).tolist()) == {0, 2}
