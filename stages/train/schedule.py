"""The learning rate of each step: a linear rise, then half a cosine down to zero.

As transformers' `get_cosine_schedule_with_warmup`, so that recipes mean the same: the first step of a rise has rate 0.
"""

import math


def rate_factor(step: int, total: int, warmup_ratio: float) -> float:
    """The learning rate of a step divided by the peak rate, in 0..1. `step` counts from 0 to `total` - 1."""
    rise = math.ceil(total * warmup_ratio)
    if step < rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))
