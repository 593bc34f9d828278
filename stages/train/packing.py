"""Which samples make a step, and how a step's samples are packed into passes.

A pass is one forward and backward pass of one process over whole samples, one after the other, without padding. How
samples are packed changes speed and memory only: the loss of a step is the mean over all its learnt tokens.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a training, and the samples of each."""

    samples: int
    """Number of training samples, at least 1."""
    effective_batch: int
    """Samples of a step. The last step of an epoch has what is left, which may be fewer."""
    epochs: float
    seed: int

    @property
    def in_epoch(self) -> int:
        """Steps of a whole epoch."""
        return math.ceil(self.samples / self.effective_batch)

    @property
    def total(self) -> int:
        """Steps of the training, at least 1. Part of an epoch is rounded up to whole steps."""
        return max(math.ceil(self.in_epoch * self.epochs), 1)

    def samples_of(self, step: int) -> list[int]:
        """The numbers of a step's samples, in order. `step` counts from 0.

        Every epoch has each sample once, in an order of its own that depends on the seed alone.
        """
        epoch, place = divmod(step, self.in_epoch)
        order = _epoch_order(self.samples, self.seed, epoch)
        return list(order[place * self.effective_batch : (place + 1) * self.effective_batch])


@lru_cache(maxsize=2)
def _epoch_order(samples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the samples in an epoch."""
    order = list(range(samples))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return tuple(order)


def pack(lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[list[int]]]:
    """Share samples over the processes and pack them into passes. Returns, for each process, its passes; a pass is a
    list of positions in `lengths`.

    `lengths` are in tokens, and so is `budget`, the most that a pass may have. A sample above the budget gets a pass of
    its own. The longest samples are placed first: each on the process with the fewest tokens so far, then into the
    first of its passes that has room (first-fit decreasing). A process may get no pass if there are few samples.
    """
    longest_first = sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))
    shares: list[list[int]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for sample in longest_first:
        process = tokens.index(min(tokens))
        shares[process].append(sample)
        tokens[process] += lengths[sample]
    return [_first_fit(share, lengths, budget) for share in shares]


def level(
    shares: Sequence[Sequence[list[int]]], lengths: Sequence[int], seeing: Sequence[bool]
) -> list[list[tuple[list[int], bool]]]:
    """Give all processes the same number of passes with pictures, and of passes without after them. Returns, for each
    process, its passes, and for each whether it counts. With a sharded base, each pass is a collective.

    `shares` is what `pack` returned for `lengths`; `seeing` says which samples have pictures. A pass that does not
    count is one sample, the shortest of its kind.
    """
    found: list[list[tuple[list[int], bool]]] = [[] for _ in shares]
    for kind in (True, False):
        own = [[one for one in passes if any(seeing[sample] for sample in one) == kind] for passes in shares]
        most = max(map(len, own))
        samples = (sample for passes in own for one in passes for sample in one if seeing[sample] == kind)
        shortest = min(samples, key=lambda sample: (lengths[sample], sample), default=0)
        for process, passes in enumerate(own):
            missing = most - len(passes)
            found[process] += [*((one, True) for one in passes), *[([shortest], False)] * missing]
    return found


def _first_fit(samples: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put each sample into the first pass that has room, or into a new one. Returns the passes."""
    passes: list[list[int]] = []
    room: list[int] = []
    for sample in samples:
        place = next((i for i, left in enumerate(room) if left >= lengths[sample]), len(room))
        if place == len(room):
            passes.append([])
            room.append(budget)
        passes[place].append(sample)
        room[place] -= lengths[sample]
    return passes
