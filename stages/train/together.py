"""What the processes of one training tell each other, beside the gradients; for one alone each answer is its own."""

import os
from datetime import timedelta
from typing import Any, TypeVar

from stages.contract.errors import InterruptedRunError
from stages.contract.stop import StopRequest

SILENCE = timedelta(minutes=30)
"""How long a process waits for another in the middle of the work. ms-swift's own limit is 208 days."""

T = TypeVar("T")


class Together:
    """The processes that torchrun started, which train one adapter. `sharding` as in `Job`."""

    def __init__(self, processes: int, use_cpu: bool, sharding: str = "none") -> None:
        self.rank = 0
        self._group: Any = None
        if processes == 1:
            if sharding != "none":
                _group_of_one(use_cpu)
            return
        import torch
        import torch.distributed as dist

        self.rank = int(os.environ["RANK"])
        if not use_cpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # before swift and accelerate, which take a group that is there
        dist.init_process_group("gloo" if use_cpu else "nccl", timeout=SILENCE)
        # what is said here goes over the processors: asking for a stop at each step must not hold up a GPU
        self._group = dist.new_group(backend="gloo", timeout=SILENCE)

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def of_first(self, value: T) -> T:
        """The first process's value, in all."""
        return self.of_all(value)[0]

    def of_all(self, value: T) -> list[T]:
        """Every process's value, in all, by rank. None goes on before all are there."""
        if self._group is None:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def sums(self, *values: int) -> list[int]:
        """The sum of each value over the processes, in all."""
        if self._group is None:
            return list(values)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values)
        dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=self._group)
        return [int(value) for value in sums.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, in all."""
        return bool(self.sums(int(flag))[0])

    def check(self, stop: StopRequest) -> None:
        """Raise InterruptedRunError in all processes if any was asked to stop."""
        if self.any(stop.signal is not None):
            stop.check()
            raise InterruptedRunError("another node was stopped; finished work is saved: run the same command again")

    def leave(self) -> None:
        """Wait for the others a last time, and part."""
        self.of_all(None)
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _group_of_one(use_cpu: bool) -> None:
    """What DeepSpeed wants even where there is only one process: a group, and the variables that torchrun sets."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {**one, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # nobody calls there
    dist.init_process_group("gloo" if use_cpu else "nccl", store=HashStore(), rank=0, world_size=1)


def lost_the_others(error: BaseException) -> bool:
    """Whether an error means that another process, or the way to it, is gone."""
    from torch.distributed import DistError

    # gloo raises plain RuntimeErrors
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
