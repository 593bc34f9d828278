"""How many sequences an engine that computes in padded batches should decode together: found by trying."""

import gc
import resource
import time
from collections.abc import Callable

import psutil
import torch

MOST = 256
"""Beyond it a batch gains nothing on any card that we measured."""

WORTH = 1.1
"""A batch twice as large is taken where it is faster by at least this factor; a kill costs a batch, too."""

SHARE = 0.7
"""Of the memory that is free before: what a batch may take. The longest prompts are tried, but with short answers."""


def best_batch_size(attempt: Callable[[int], None], most: int = MOST) -> tuple[int, str]:
    """The batch size, and why it is that. `attempt` decodes so many of the longest prompts.

    Sizes are doubled as long as sequences are decoded faster; one for which memory does not suffice is too large.
    """
    attempt(1)  # kernels are loaded and compiled by the first
    best, speed, why = 1, 0.0, "larger ones were not faster"
    size, free, before = 1, _free_memory(), psutil.Process().memory_info().rss
    while size <= most:
        _forget()
        began = time.perf_counter()
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            why = f"{size} ran out of memory"
            break
        now = size / (time.perf_counter() - began)
        if now < WORTH * speed:
            break
        best, speed = size, now
        if 2 * _most_taken(before) > SHARE * free:
            why = f"{2 * size} would take more than {SHARE:.0%} of the free memory"
            break
        size *= 2
    else:
        why = "the most there is any use for, or to ask"
    _forget()
    return best, why


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _free_memory() -> int:
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(psutil.virtual_memory().available)


def _most_taken(before: int) -> int:
    """Bytes that the last attempt took at most beside the weights, on a card; on a CPU that any has taken since this
    process had `before`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
