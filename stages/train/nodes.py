"""How several machines come to train the same adapter at the same time: node 0 announces it, the others follow.

Only node 0 knows what is left to do: it alone reads and writes the stage's folder. What it announces stands there in
`checkpoints/announced.json`, for as long as its processes run; the others look there until its manifest says that all
is done.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from stages.contract.errors import InterruptedRunError
from stages.contract.files import FileHashes, read_json, remove, write_json
from stages.contract.part import Node
from stages.contract.recipe import CONNECTOR
from stages.contract.stage import Stage
from stages.train.torchrun import JOIN_SECONDS


def place_of(name: str) -> tuple[str, ...]:
    """Where below the stage's folder an adapter, or the connector, stands once it is trained."""
    return (CONNECTOR,) if name == CONNECTOR else ("adapters", name)


@contextmanager
def announced(stage: Stage, adapter: str, node: Node | None) -> Iterator[None]:
    """Have the other nodes, where there are any, train this adapter too, or the connector."""
    if node is None:
        yield
        return
    path = stage.path("checkpoints", "announced.json")
    write_json(path, {"key": stage.key, "adapter": adapter, "round": time.time_ns()})
    try:
        yield
    finally:
        remove(path)


def adapters_announced_by_the_first(stage: Stage) -> Iterator[str]:
    """Adapters in the order in which node 0 announces them, until it is done.

    Raises InterruptedRunError when it announces nothing for JOIN_SECONDS, or a stop was asked for.
    """
    run, joined = stage.run, None
    hashes = FileHashes(stage.path(".hashes.json"))
    patience = time.monotonic() + JOIN_SECONDS
    stage.events.say("waiting for node 0")
    while not run.is_done(stage.name, hashes):
        stage.stop.check()
        found = read_json(run.path(stage.name, "checkpoints", "announced.json"))
        # one of a start that was killed may still stand there: of other inputs, or of an adapter that is done
        is_new = found is not None and found["key"] == stage.key and found["round"] != joined
        if is_new and not run.path(stage.name, *place_of(found["adapter"])).is_dir():
            joined = found["round"]
            yield found["adapter"]
            patience = time.monotonic() + JOIN_SECONDS
        elif time.monotonic() > patience:
            raise InterruptedRunError(
                f"node 0 has not begun to train for {JOIN_SECONDS // 60} minutes; start it, then run again"
            )
        else:
            time.sleep(1)
