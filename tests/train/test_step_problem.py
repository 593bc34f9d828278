"""Which steps end a training, and which ones float16's loss scale may skip."""

import math

import pytest
import torch

from stages.train.loop import LossScale, step_problem


def test_a_step_that_float16_s_loss_scale_skips_is_no_failure_until_the_scale_is_below_one() -> None:
    scale, found = LossScale(4.0), []
    for _ in range(3):
        scale.update(overflowed=True)
        found.append(step_problem(2.5, math.inf, True, scale.value))
    assert found == [None, None, "the gradient norm is not finite"]


def test_the_loss_scale_is_that_of_torch_s_scaler() -> None:
    scale, scaler = LossScale(), torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(2010):
        overflowed = step in (3, 5)
        scaler.scale(weight.sum() * (math.inf if overflowed else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scale.update(overflowed)
        assert scale.value == scaler.get_scale(), step
    assert scale.value == 2.0**15, "halved twice, doubled once"


@pytest.mark.parametrize(
    ("loss", "norm", "skipped", "scale", "problem"),
    [
        (2.5, 1.0, False, None, None),
        (math.nan, 1.0, False, None, "the loss is NaN"),
        (math.inf, 1.0, False, None, "the loss is infinite"),
        (math.nan, math.nan, True, 32768.0, "the loss is NaN"),
        (2.5, math.nan, False, None, "the gradient norm is not finite"),
        (2.5, math.inf, False, 65536.0, "the gradient norm is not finite"),
        (2.5, math.inf, True, 0.5, "the gradient norm is not finite"),
    ],
)
def test_what_is_not_finite_is_named(
    loss: float, norm: float, skipped: bool, scale: float | None, problem: str | None
) -> None:
    assert step_problem(loss, norm, skipped, scale) == problem
