"""How several machines train the same adapter at the same time: node 0 announces it, the others follow.

Only node 0 reads and writes the stage's folder and knows which adapters are left. While its processes run, the adapter
is named in `checkpoints/announced.json`. The other nodes read that file until node 0's manifest is written.
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
    """Parts of the path, below the stage's folder, of a trained adapter or of the connector."""
    return (CONNECTOR,) if name == CONNECTOR else ("adapters", name)


@contextmanager
def announce_training(stage: Stage, adapter: str, node: Node | None) -> Iterator[None]:
    """Announce an adapter or the connector to the other nodes, if there are any, while the context lasts."""
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
    """Names of adapters in the order in which node 0 announces them, until it is done.

    Raises InterruptedRunError if node 0 announces nothing for JOIN_SECONDS, or this process is asked to stop.
    """
    run, joined = stage.run, None
    hashes = FileHashes(stage.path(".hashes.json"))
    patience = time.monotonic() + JOIN_SECONDS
    stage.events.say("waiting for node 0")
    while not run.is_done(stage.name, hashes):
        stage.stop.check()
        found = read_json(run.path(stage.name, "checkpoints", "announced.json"))
        # the file may be left from a killed start: for other inputs, or for an adapter that is done
        is_new = found is not None and found["key"] == stage.key and found["round"] != joined
        if is_new and not run.path(stage.name, *place_of(found["adapter"])).is_dir():
            joined = found["round"]
            yield found["adapter"]
            patience = time.monotonic() + JOIN_SECONDS
        elif time.monotonic() > patience:
            raise InterruptedRunError(
                f"node 0 announced no training for {JOIN_SECONDS // 60} minutes; start it, then run this command again"
            )
        else:
            time.sleep(1)
