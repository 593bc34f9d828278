"""Which steps end a training, and which ones float16's loss scale may skip."""

import math

import pytest
import torch

from stages.train.losses import step_problem


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_float16_s_loss_scale_skips_is_no_failure_until_the_scale_is_below_one(fused: bool) -> None:
    """torch's own scaler, on the CPU: gradients that overflow at every scale."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.AdamW([weight], fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
    found = []
    for _ in range(3):
        before = scaler.get_scale()
        scaler.scale((weight * math.inf).sum()).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped = scaler.get_scale() < before
        found.append(step_problem(2.5, float(norm), skipped, scaler.get_scale()))
    assert found == [None, None, "the gradient norm is not finite"]
    assert weight.tolist() == [1.0, 1.0]
    assert max((int(state["step"]) for state in optimizer.state.values()), default=0) == 0, "it counts updates only"


@pytest.mark.parametrize(
    ("loss", "norm", "skipped", "scale", "problem"),
    [
        (2.5, 1.0, False, None, None),
        (2.5, None, False, None, None),
        (math.nan, 1.0, False, None, "the loss is NaN"),
        (math.inf, 1.0, False, None, "the loss is infinite"),
        (math.nan, math.nan, True, 32768.0, "the loss is NaN"),
        (2.5, math.nan, False, None, "the gradient norm is not finite"),
        (2.5, math.inf, False, 65536.0, "the gradient norm is not finite"),
        (2.5, -1.0, False, None, "the gradient norm is not finite"),  # as DeepSpeed writes it
        (2.5, 1.0, True, None, "the gradient norm is not finite"),  # DeepSpeed skips without a scale, too
    ],
)
def test_what_is_not_finite_is_named(
    loss: float, norm: float | None, skipped: bool, scale: float | None, problem: str | None
) -> None:
    assert step_problem(loss, norm, skipped, scale) == problem
