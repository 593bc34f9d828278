"""Work done ahead in threads: the next passes are read while the card computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 4
"""Items that are worked on before they are needed."""


def ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the result of `work` for each item, in order, with the next AHEAD items already in work. An error in `work`
    is raised where its result would be yielded."""
    left = iter(items)
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = deque(pool.submit(work, item) for item in islice(left, AHEAD))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in islice(left, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
