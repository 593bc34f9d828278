"""The effective batch stays the recipe's on any number of GPUs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.hardware.batch import plan_batch

effective_batches = st.integers(1, 600)
micro_batches = st.integers(1, 40)
gpu_counts = st.integers(1, 16)


@pytest.mark.parametrize(
    ("effective", "micro", "gpus", "made"),
    [
        (128, 1, 5, 130),  # 125 is further away
        (128, 16, 8, 128),
        (16, 1, 3, 15),
        (12, 1, 8, 16),  # 8 and 16 are as near: upward
        (8, 64, 1, 8),
        (1, 4, 8, 8),  # less than one sample a card cannot be
        (100, 16, 1, 100),
    ],
)
def test_known_plans(effective: int, micro: int, gpus: int, made: int) -> None:
    assert plan_batch(effective, micro, gpus).effective == made


@given(effective_batches, micro_batches, gpu_counts)
def test_no_other_plan_comes_nearer(effective: int, micro: int, gpus: int) -> None:
    plan = plan_batch(effective, micro, gpus)
    others = [m * a * gpus for m in range(1, micro + 1) for a in range(1, effective // (m * gpus) + 3)]
    nearest = min(abs(other - effective) for other in others)
    assert abs(plan.effective - effective) == nearest
    ties = [other for other in others if abs(other - effective) == nearest]
    assert plan.effective == max(ties)


@given(effective_batches, micro_batches, gpu_counts)
def test_a_plan_fits_the_card_and_takes_the_largest_micro_batch_that_does_it(
    effective: int, micro: int, gpus: int
) -> None:
    plan = plan_batch(effective, micro, gpus)
    assert 1 <= plan.micro_batch <= micro
    assert plan.accumulation >= 1
    assert plan.gpus == gpus
    larger = range(plan.micro_batch + 1, micro + 1)
    assert not [m for m in larger if plan.effective % (m * gpus) == 0]


def test_a_cpu_counts_as_one_card() -> None:
    assert plan_batch(8, 4, 0) == plan_batch(8, 4, 1)


def test_a_changed_batch_is_told() -> None:
    assert str(plan_batch(128, 1, 5)) == "1 x 26 x 5 GPU(s) = 130, the nearest to 128"
    assert str(plan_batch(128, 16, 8)) == "16 x 1 x 8 GPU(s) = 128"
