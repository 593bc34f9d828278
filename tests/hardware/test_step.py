"""How a step is computed, in words and in samples of a process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.hardware.memory import Lengths
from stages.hardware.step import StepPlan


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (StepPlan(16, 1, 8192), "16 samples a step in passes of at most 8,192 tokens"),
        (StepPlan(128, 5, 16_384), "128 samples a step in passes of at most 16,384 tokens by 5 processes"),
        (StepPlan(1, 1, 64), "1 sample a step in passes of at most 64 tokens"),
        (StepPlan(8, 2, 600), "8 samples a step in passes of at most 600 tokens by 2 processes"),
        (StepPlan(8, 1, 600, 7), "8 samples a step in passes of at most 600 tokens, with 7 checkpointed layers"),
    ],
)
def test_a_step_in_words(step: StepPlan, text: str) -> None:
    assert str(step) == text


@pytest.mark.parametrize(("effective", "processes", "samples"), [(128, 5, 26), (16, 3, 6), (1, 4, 1), (16, 1, 16)])
def test_any_number_of_processes_shares_the_recipes_samples(effective: int, processes: int, samples: int) -> None:
    step = StepPlan(effective, processes, 1024)
    assert (step.effective_batch, step.samples_of_a_process) == (effective, samples)


def test_a_pass_has_no_more_tokens_than_the_samples_of_a_step() -> None:
    alike, mixed = Lengths(300, 10), Lengths(300, 10, mean=100.0, deviation=20.0)
    assert alike.largest_pass(StepPlan(16, 1, 16_384)) == 4800
    assert alike.largest_pass(StepPlan(16, 1, 2048)) == 2048
    assert mixed.largest_pass(StepPlan(16, 1, 16_384)) == 1600 + 3 * 4 * 20
    assert mixed.largest_pass(StepPlan(16, 4, 16_384)) == 400 + 3 * 2 * 20
    assert alike.largest_pass(StepPlan(16, 1, 200)) == 300, "a longer sample has a pass of its own"


@given(st.integers(1, 600), st.integers(1, 16), st.integers(16, 9000), st.integers(16, 20_000), st.floats(0, 1))
def test_a_pass_is_never_expected_below_its_longest_sample_nor_above_its_tokens(
    effective: int, processes: int, longest: int, tokens: int, share: float
) -> None:
    lengths = Lengths(longest, 16, mean=max(longest * share, 1), deviation=longest * share / 3)
    found = lengths.largest_pass(StepPlan(effective, processes, tokens))
    assert longest <= found <= max(longest, tokens)
    assert 1 <= lengths.learnt(found) <= found
