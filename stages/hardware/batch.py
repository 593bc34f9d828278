"""Plans micro-batch and accumulation so that the effective batch stays the recipe's on any number of GPUs."""

from dataclasses import dataclass

from stages.contract.errors import DoesNotFitError


@dataclass(frozen=True)
class BatchPlan:
    """How an effective batch is composed: micro_batch (samples) x accumulation (forward passes) x gpus."""

    wanted: int
    """The recipe's effective batch, in samples."""
    micro_batch: int
    accumulation: int
    gpus: int

    @property
    def effective_batch(self) -> int:
        """Samples per optimizer step by this plan, over all GPUs."""
        return self.micro_batch * self.accumulation * self.gpus

    def __str__(self) -> str:
        made = f"{self.micro_batch} x {self.accumulation} x {self.gpus} GPU(s) = {self.effective_batch}"
        return made if self.effective_batch == self.wanted else f"{made}, the nearest to {self.wanted}"


def plan_batch(effective_batch: int, micro_batch: int, gpus: int) -> BatchPlan:
    """The plan whose effective batch is nearest to `effective_batch` (samples); of two equally near, the larger.

    `micro_batch` is the largest allowed; a smaller one is used only if it comes closer, or as close from above.
    """
    plans = []
    for micro in range(micro_batch, 0, -1):
        step = micro * max(gpus, 1)
        accumulation = max((2 * effective_batch + step) // (2 * step), 1)
        plans.append(BatchPlan(effective_batch, micro, accumulation, max(gpus, 1)))
    return min(
        plans,
        key=lambda plan: (abs(plan.effective_batch - effective_batch), -plan.effective_batch, -plan.micro_batch),
    )


def refuse_inexact_batch(batch: BatchPlan, key: str, most_gpus: int = 64) -> None:
    """Raise DoesNotFitError if a plan does not reach exactly the effective batch that the recipe's `key` sets.

    The message names the nearest GPU counts, up to `most_gpus`, that do.
    """
    if batch.effective_batch == batch.wanted:
        return
    counts = [gpus for gpus in range(1, most_gpus + 1) if batch.wanted % gpus == 0]
    fewer = [gpus for gpus in counts if gpus < batch.gpus][-1:]
    more = [gpus for gpus in counts if gpus > batch.gpus][:1]
    ways = [str(plan_batch(batch.wanted, batch.micro_batch, gpus)) for gpus in fewer + more]
    raise DoesNotFitError(
        f"{key} {batch.wanted}: train.exact_batch is set, but the nearest that {batch.gpus} GPU(s) can do is"
        f" {batch.effective_batch}; use an exact plan (micro-batch x accumulation x GPUs): {', or '.join(ways)}"
    )
