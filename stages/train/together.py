"""How the processes of one training exchange small values, apart from gradients. A single process exchanges nothing."""

import os
from datetime import timedelta
from typing import Any, TypeVar

from stages.contract.errors import InterruptedRunError
from stages.contract.stop import StopRequest

SILENCE = timedelta(minutes=30)
"""Longest time that a process waits for another one in training."""

T = TypeVar("T")


class Together:
    """The processes that train one adapter together. torchrun starts them if there are several."""

    def __init__(self, processes: int, use_cpu: bool) -> None:
        """Join the group of all training processes. A single process joins none."""
        self.rank = 0
        self._group: Any = None
        if processes == 1:
            return
        import torch
        import torch.distributed as dist

        self.rank = int(os.environ["RANK"])
        if not use_cpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo" if use_cpu else "nccl", timeout=SILENCE)
        # a group on the CPUs: the exchange of stop requests at each step must not delay a GPU
        self._group = dist.new_group(backend="gloo", timeout=SILENCE)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that sends progress and writes files for all."""
        return self.rank == 0

    def first_value(self, value: T) -> T:
        """Return the first process's value in every process. Waits for all processes."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of ranks, in every process. Waits for all processes."""
        if self._group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def sums(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes, in every process. Waits for all processes."""
        if self._group is None:
            return list(values)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=self._group)
        return [float(value) for value in sums.tolist()]

    def is_set_anywhere(self, flag: bool) -> bool:
        """Return, in every process, whether the flag is set in at least one. Waits for all processes."""
        return bool(self.sums(int(flag))[0])

    def check_stop(self, stop: StopRequest) -> None:
        """Raise InterruptedRunError in every process if at least one is asked to stop. Waits for all processes."""
        if self.is_set_anywhere(stop.signal is not None):
            stop.check()
            raise InterruptedRunError("another training process: asked to stop; run the same command again to resume")

    def leave(self) -> None:
        """Wait for all processes, then leave the group."""
        self.gather(None)
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def is_peer_lost(error: BaseException) -> bool:
    """Whether an error means that another training process ended or cannot be reached."""
    from torch.distributed import DistError

    # gloo raises plain RuntimeErrors
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
