"""How several nodes train the same adapter together: node 0 announces it, the other nodes join.

Only node 0 knows which adapters are still to be trained. While its training processes run, `checkpoints/announced.json`
names their adapter. The other nodes read that file until node 0 writes its manifest.
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


def folder_parts(name: str) -> tuple[str, ...]:
    """The parts of the path of an adapter's or the connector's folder, relative to the stage's folder."""
    return (CONNECTOR,) if name == CONNECTOR else ("adapters", name)


@contextmanager
def announce_training(stage: Stage, adapter: str, key: str, node: Node | None) -> Iterator[None]:
    """Within this context, announce the training of an adapter or the connector, with its key, to the other nodes.

    Does nothing if `node` is None: there are no other nodes.
    """
    if node is None:
        yield
        return
    path = stage.path("checkpoints", "announced.json")
    write_json(path, {"key": stage.key, "adapter": adapter, "made": key, "round": time.time_ns()})
    try:
        yield
    finally:
        remove(path)


def announced_adapters(stage: Stage) -> Iterator[str]:
    """Yield the name of each adapter, or of the connector, that node 0 announces, until node 0 finishes the stage.

    Raises InterruptedRunError if node 0 announces nothing for JOIN_SECONDS, or if this process is asked to stop.
    """
    run, joined = stage.run, None
    hashes = FileHashes(stage.path(".hashes.json"))
    patience = time.monotonic() + JOIN_SECONDS
    stage.events.say("waits for node 0")
    while not run.is_done(stage.name, hashes):
        stage.stop.check()
        found = read_json(run.path(stage.name, "checkpoints", "announced.json"))
        # a killed start may have left the file: for other inputs, or for an adapter that is trained already
        is_new = found is not None and found["key"] == stage.key and found["round"] != joined
        made = read_json(run.path(stage.name, *folder_parts(found["adapter"]), "made.json")) if is_new else None
        if is_new and (made or {}).get("key") != found.get("made"):
            joined = found["round"]
            yield found["adapter"]
            patience = time.monotonic() + JOIN_SECONDS
        elif time.monotonic() > patience:
            raise InterruptedRunError(
                f"node 0: announced no training for {JOIN_SECONDS // 60} minutes; start it, then run this command again"
            )
        else:
            time.sleep(1)
