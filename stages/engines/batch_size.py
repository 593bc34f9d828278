"""The number of sequences to decode together, for an engine that computes in padded batches: found by trial."""

import gc
import resource
import time
from collections.abc import Callable

import psutil
import torch

MOST = 256
"""Sequences; a larger batch was not faster on any card that we measured."""

WORTH = 1.1
"""A batch twice as large is used if it is faster by at least this factor: a kill loses a whole batch."""

SHARE = 0.7
"""Share of the free memory that a batch may take. Trials have the longest prompts, but short answers."""


def best_batch_size(attempt: Callable[[int], None], most: int = MOST) -> tuple[int, str]:
    """The batch size and the reason for it. `attempt(n)` decodes the n longest prompts together.

    Sizes double, up to `most`, as long as more sequences are decoded in a second. A size that runs out of memory is too
    large.
    """
    attempt(1)  # the first one loads and compiles kernels
    best, speed, why = 1, 0.0, "larger ones were not faster"
    size, free, before = 1, _free_memory(), psutil.Process().memory_info().rss
    while size <= most:
        _free_caches()
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
        if 2 * _peak_memory(before) > SHARE * free:
            why = f"{2 * size} would take more than {SHARE:.0%} of the free memory"
            break
        size *= 2
    else:
        why = f"larger than {most} is not tried"
    _free_caches()
    return best, why


def _free_caches() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _free_memory() -> int:
    """Bytes free on the GPU, or in the machine if it has no GPU."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(psutil.virtual_memory().available)


def _peak_memory(before: int) -> int:
    """The peak of the last attempt beside the weights, in bytes. On a CPU the peak of all attempts, above the bytes
    that the process had `before`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
