"""Find by trial how many sequences to decode together, for an engine that computes in padded batches."""

import gc
import resource
import time
from collections.abc import Callable

import psutil
import torch

MOST = 256
"""Largest batch to try, in sequences. A larger one was not faster on any card that was measured."""

WORTH = 1.1
"""Least speed-up, as a ratio of sequences per second, for which a batch of twice the size is used: a kill loses a whole
batch."""

SHARE = 0.7
"""Largest share of the free memory that a batch may use. The rest is for completions, which are short in trials."""


def best_batch_size(attempt: Callable[[int], None], most: int = MOST) -> tuple[int, str]:
    """Find the best batch size by trial. Returns it, in sequences, and the reason.

    `attempt(n)` must decode the n longest prompts together. The size doubles, up to `most`, until a larger batch would
    take too much memory or is less than WORTH times as fast. Raises torch.OutOfMemoryError if the longest prompt alone
    does not fit.
    """
    attempt(1)  # not measured: the first attempt loads and compiles kernels
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
    """Free the memory that earlier attempts left cached, and reset torch's record of the GPU's peak memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _free_memory() -> int:
    """Free memory of the GPU or, without a GPU, of the machine, in bytes. What torch has only cached counts as free."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(psutil.virtual_memory().available)


def _peak_memory(before: int) -> int:
    """Peak memory of the last attempt, without the weights, in bytes.

    On a CPU, the process's peak so far, minus `before`: the bytes that it used before the measured attempts.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
