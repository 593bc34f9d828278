"""Process pages in worker processes. If one crashes or hangs on a malformed page, the others' work is not lost."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from typing import Any

from pebble import ProcessExpired, ProcessPool

from stages.contract.stop import StopRequest, die_with_parent
from stages.preprocess.render import PageRange

Records = list[dict[str, Any]]


def run_in_workers(
    call: Callable[[PageRange], tuple[Callable[..., Records], tuple[Any, ...]]],
    ranges: list[PageRange],
    workers: int,
    page_timeout: float,
    stop: StopRequest,
) -> Iterator[tuple[PageRange, Records]]:
    """Process page ranges in `workers` processes. Yields each range with its records as soon as it is done.

    `call` returns the function and arguments for a range. If a worker crashes or takes longer than `page_timeout`
    seconds per page, the range is tried again page by page; the page at fault yields one record, whose `status` says
    so. Only a few ranges per worker are submitted at a time, so the cost per range does not grow with their number.
    """
    if not ranges:
        return
    todo, flying = deque(ranges), dict[Future[Records], PageRange]()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPool(workers, initializer=die_with_parent, initargs=(os.getpid(),), context=context)
    try:
        while todo or flying:
            while todo and len(flying) < 4 * workers:
                pages = todo.popleft()
                function, arguments = call(pages)
                flying[pool.schedule(function, args=arguments, timeout=page_timeout * len(pages))] = pages
            done = wait(flying, timeout=1, return_when=FIRST_COMPLETED).done
            if not done:
                # a worker that a stop ends while it holds the pool's lock keeps the others waiting for a minute
                stop.check()
            for future in done:
                pages = flying.pop(future)
                try:
                    yield pages, future.result()
                except (ProcessExpired, TimeoutError) as error:
                    stop.check()  # a stop of the whole process group ends the workers, too; not the page's fault
                    if len(pages) > 1:
                        todo.extend(pages.pages())
                    else:
                        what = "took too long" if isinstance(error, TimeoutError) else "crashed its worker"
                        yield pages, [{"page": pages.first + 1, "status": f"page {what}"}]
    finally:
        pool.stop()
        pool.join()
