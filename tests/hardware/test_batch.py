"""The effective batch stays the recipe's on any number of GPUs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.contract.errors import DoesNotFitError
from stages.hardware.batch import plan_batch, refuse_inexact_batch

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
    assert plan_batch(effective, micro, gpus).effective_batch == made


@given(effective_batches, micro_batches, gpu_counts)
def test_no_other_plan_comes_nearer(effective: int, micro: int, gpus: int) -> None:
    plan = plan_batch(effective, micro, gpus)
    others = [m * a * gpus for m in range(1, micro + 1) for a in range(1, effective // (m * gpus) + 3)]
    nearest = min(abs(other - effective) for other in others)
    assert abs(plan.effective_batch - effective) == nearest
    ties = [other for other in others if abs(other - effective) == nearest]
    assert plan.effective_batch == max(ties)


@given(effective_batches, micro_batches, gpu_counts)
def test_a_plan_fits_the_card_and_takes_the_largest_micro_batch_that_does_it(
    effective: int, micro: int, gpus: int
) -> None:
    plan = plan_batch(effective, micro, gpus)
    assert 1 <= plan.micro_batch <= micro
    assert plan.accumulation >= 1
    assert plan.gpus == gpus
    larger = range(plan.micro_batch + 1, micro + 1)
    assert not [m for m in larger if plan.effective_batch % (m * gpus) == 0]


def test_a_cpu_counts_as_one_card() -> None:
    assert plan_batch(8, 4, 0) == plan_batch(8, 4, 1)


def test_a_changed_batch_is_reported() -> None:
    assert str(plan_batch(128, 1, 5)) == "1 x 26 x 5 GPU(s) = 130, the nearest to 128"
    assert str(plan_batch(128, 16, 8)) == "16 x 1 x 8 GPU(s) = 128"


@pytest.mark.parametrize(
    ("effective", "gpus", "made", "ways"),
    [
        (128, 5, 130, ["x 4 GPU(s) = 128", "x 8 GPU(s) = 128"]),
        (256, 3, 255, ["x 2 GPU(s) = 256", "x 4 GPU(s) = 256"]),
        (7, 9, 9, ["x 7 GPU(s) = 7"]),
    ],
)
def test_a_batch_that_must_be_exact_names_the_nearest_gpus_that_make_it(
    effective: int, gpus: int, made: int, ways: list[str]
) -> None:
    with pytest.raises(DoesNotFitError, match=r"train\.effective_batch \d+: train\.exact_batch is set") as raised:
        refuse_inexact_batch(plan_batch(effective, 4, gpus), "train.effective_batch")
    assert f"the nearest that {gpus} GPU(s) can do is {made}" in str(raised.value)
    assert all(way in str(raised.value) for way in ways)
    assert str(raised.value).count("GPU(s) = ") == len(ways)
    assert raised.value.exit_code == 4


@given(effective_batches, micro_batches, gpu_counts)
def test_it_is_refused_where_the_gpus_do_not_divide_it_and_only_there(effective: int, micro: int, gpus: int) -> None:
    plan = plan_batch(effective, micro, gpus)
    if effective % gpus:
        with pytest.raises(DoesNotFitError):
            refuse_inexact_batch(plan, "train.effective_batch")
    else:
        refuse_inexact_batch(plan, "train.effective_batch")
