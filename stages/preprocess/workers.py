"""Process pages in worker processes. If one crashes or hangs on a malformed page, the others' work is not lost."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from multiprocessing.sharedctypes import RawArray
from typing import Any

from pebble import ProcessExpired, ProcessPool

from stages.contract.stop import StopRequest, die_with_parent
from stages.preprocess.render import PageRange
from stages.preprocess.watch import OPENING, watch

Records = list[dict[str, Any]]

TOOK_TOO_LONG = "took too long"
"""End of the status of a page whose time ran out."""


def run_in_workers(
    call: Callable[[PageRange], tuple[Callable[..., Records], tuple[Any, ...]]],
    ranges: list[PageRange],
    workers: int,
    page_timeout: float,
    stop: StopRequest,
    unit: str = "page",
) -> Iterator[tuple[PageRange, Records]]:
    """Process page ranges in `workers` processes. Yields each range, or each part that is tried again, with its records
    as soon as it is done.

    `call` returns the function and arguments for a range. If a worker crashes, or takes longer than `page_timeout`
    seconds for a page, that page yields one record, whose `status` begins with `unit` and says what happened, and the
    rest of its range is tried again. If the board does not show which of several pages the worker was at, all pages of
    the range are tried again, one by one. Only a few ranges per worker are submitted at a time, so the cost per range
    does not grow with their number.

    Raises what the function raises, and InterruptedRunError if the stage is asked to stop.
    """
    if not ranges:
        return
    todo, flying = deque(ranges), dict[Future[Records], tuple[PageRange, int]]()
    context = multiprocessing.get_context("spawn")
    free = list(range(4 * workers))
    board = RawArray("i", len(free))
    pool = ProcessPool(workers, initializer=_begin_worker, initargs=(os.getpid(), board), context=context)
    try:
        while todo or flying:
            while todo and free:
                pages, slot = todo.popleft(), free.pop()
                board[slot] = OPENING
                flying[pool.schedule(_work, args=(slot, page_timeout, *call(pages)))] = pages, slot
            done = wait(flying, timeout=1, return_when=FIRST_COMPLETED).done
            if not done:
                # a worker that a stop ends while it holds the pool's lock keeps the others waiting for a minute
                stop.check()
            for future in done:
                pages, slot = flying.pop(future)
                free.append(slot)
                try:
                    yield pages, future.result()
                except ProcessExpired as error:
                    stop.check()  # a stop of the whole process group ends the workers, too; not the page's fault
                    at = pages.first if len(pages) == 1 else board[slot]
                    if at == OPENING:
                        todo.extend(pages.pages())
                        continue
                    fault = TOOK_TOO_LONG if error.exitcode == -signal.SIGALRM else "crashed its worker"
                    before, page, after = pages.split_at(at)
                    todo.extend(part for part in (before, after) if len(part))
                    yield page, [{"page": at + 1, "status": f"{unit} {fault}"}]
    finally:
        pool.stop()
        pool.join()


def _begin_worker(parent: int, board: MutableSequence[int]) -> None:
    """Prepare a worker process: it dies with its parent, can be terminated at any time, and shares its board.

    The terminal's Ctrl-C and hang-up are the parent's to handle.
    """
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool's handler does not run inside a library's C code
    watch.share(board)


def _work(slot: int, page_timeout: float, function: Callable[..., Records], arguments: tuple[Any, ...]) -> Records:
    """Return the records that the function makes of a range, with the time limit on."""
    watch.begin(slot, page_timeout)
    try:
        return function(*arguments)
    finally:
        watch.end()
