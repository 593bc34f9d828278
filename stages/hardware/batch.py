"""Keep the recipe's effective batch on any number of GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """How an effective batch is made up: micro_batch x accumulation x gpus."""

    wanted: int
    micro_batch: int
    accumulation: int
    gpus: int

    @property
    def effective(self) -> int:
        return self.micro_batch * self.accumulation * self.gpus

    def __str__(self) -> str:
        made = f"{self.micro_batch} x {self.accumulation} x {self.gpus} GPU(s) = {self.effective}"
        return made if self.effective == self.wanted else f"{made}, the nearest to {self.wanted}"


def plan_batch(effective: int, micro_batch: int, gpus: int) -> BatchPlan:
    """Choose the plan whose effective batch (in samples) is nearest to the recipe's; ties go upward.

    `micro_batch` is the most that fits on a card; a smaller one is taken only where it comes nearer.
    """
    plans = []
    for micro in range(micro_batch, 0, -1):
        step = micro * max(gpus, 1)
        accumulation = max((2 * effective + step) // (2 * step), 1)
        plans.append(BatchPlan(effective, micro, accumulation, max(gpus, 1)))
    return min(plans, key=lambda plan: (abs(plan.effective - effective), -plan.effective, -plan.micro_batch))
