"""The loss of a pass, with logits only where something is learnt.

A vocabulary of 152,000 makes 600 KB of float32 logits a token, and most tokens of a prompt are not learnt. `loss_sum`
computes the logits of learnt positions alone, a chunk at a time, and makes their gradients in the forward pass, so that
no logits are kept.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import functional

from stages.hardware.memory import LOGITS
from stages.models.head import Head
from stages.train.lora import has_kernels
from stages.train.sharding import gathered


def loss_sum(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross entropies of `targets` and the number of targets with the highest logit; scalars in float32.

    `hidden` [targets, size] are the last hidden states before each target; a target below 0 has no loss.
    """
    chunk = max(LOGITS // vocabulary, 1)
    total, right = _LossSum.apply(hidden, head, targets, chunk, *head.trained)
    return total, right


class _LossSum(torch.autograd.Function):
    """Sum of cross entropies, a chunk of positions at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, targets: torch.Tensor, chunk: int, *trained: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the sum, the number of right targets, and the gradients of `hidden` and of the head's weights."""
        needed = any(ctx.needs_input_grad)
        gradient = torch.empty_like(hidden) if needed else None
        more = [torch.zeros_like(weight) for weight in trained]
        total, right = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        compute = _in_place if has_kernels(hidden.device) and head.is_plain else _by_autograd
        with gathered(head.module) if head.is_sharded else nullcontext():
            for first in range(0, len(targets), chunk):
                part = slice(first, first + chunk)
                into = None if gradient is None else gradient[part]
                loss, count = compute(hidden[part], head, targets[part], into, trained, more)
                total += loss
                right += count
        ctx.save_for_backward(*(() if gradient is None else (gradient, *more)))
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """The gradients of `hidden` and of the head's trained weights."""
        first, *more = ((part.float() * gradients[0]).to(part.dtype) for part in ctx.saved_tensors)
        return first, None, None, None, *more


def _by_autograd(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    into: torch.Tensor | None,
    trained: tuple[torch.Tensor, ...],
    more: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a chunk and its number of right targets. Writes the gradient of `hidden` to `into`, unless that is
    None, and adds those of the trained weights to `more`."""
    part = hidden.detach().requires_grad_(into is not None)
    with torch.set_grad_enabled(into is not None):
        logits = head.logits(part)
        loss = functional.cross_entropy(logits, targets, reduction="sum")
    if into is not None:
        found = torch.autograd.grad(loss, (part, *trained))
        into.copy_(found[0])
        for summed, gradient in zip(more, found[1:], strict=True):
            summed.add_(gradient)
    return loss.detach(), (logits.argmax(1) == targets).sum()


def _in_place(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, into: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_by_autograd` for a plain head on a GPU, where the logits become their own gradient in one kernel."""
    from stages.train.kernels import cross_entropy_in_place

    weight: torch.Tensor = head.module.weight  # type: ignore[assignment]
    logits = hidden @ weight.t()
    found = cross_entropy_in_place(logits, targets)
    if into is not None:
        torch.mm(logits, weight, out=into)
    return found
