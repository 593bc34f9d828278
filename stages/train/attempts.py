"""Trains one adapter or the connector: attempt by attempt, each with less memory, until it is finished."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.contract.errors import DoesNotFitError
from stages.contract.files import read_json, remove, write_json
from stages.contract.part import Node
from stages.contract.recipe import Adapter
from stages.contract.stage import Stage
from stages.contract.superseded import publish, trained_key
from stages.hardware.probe import Gpu, probe
from stages.models.chat_settings import chat_settings
from stages.train.checkpoints import checkpoints_of_earlier_versions
from stages.train.job import Job
from stages.train.ladder import Attempt, Ladder, MemoryRanOutError, memory_advice, next_rung
from stages.train.nodes import folder_parts
from stages.train.planning import Plan
from stages.train.torchrun import TrainingProcesses

GIB = 1024**3

MEMORY_SLACK = 256 * 1024**2
"""Bytes by which a GPU's free memory may stay below its earlier value: what other programs use varies."""

MEMORY_PATIENCE = 60.0
"""Seconds to wait until the driver frees the memory of a process that has ended."""


def train_through_ladder(
    stage: Stage,
    adapter: Adapter,
    key: str,
    plan: Plan,
    processes: TrainingProcesses,
    node: Node | None,
    connector: tuple[Path, str] | None,
) -> None:
    """Train one adapter or the connector. Each time memory runs out, try again with the ladder's next change.

    The result replaces an earlier one when it is complete. `key` is a digest of everything that it depends on; nodes
    other than node 0 write no result and need none. `connector` is the file and sha256 of the connector that an adapter
    is trained with; None: the base's own. Raises DoesNotFitError if memory runs out and no change is left, or several
    nodes train together: all of them have to start again. Raises the errors of `TrainingProcesses.train` for any
    other failure.
    """
    name = adapter.name
    # with several nodes, checkpoints and adapter are in node 0's folder
    work = stage.run.path("train", "checkpoints", name) if node else stage.path("checkpoints", name)
    ladder = Ladder.read(work, min((gpu.memory_total for gpu in plan.gpus), default=0))
    attempt = ladder.apply_rungs(plan.first_attempt)
    for rung in ladder.ignored:
        stage.events.say(
            f"{ladder.path}: {rung['decision']['value']!r} is of an earlier version and ignored: passes are counted in"
            " tokens now; nothing to do"
        )
    if earlier := checkpoints_of_earlier_versions(work):
        stage.events.say(
            f"{earlier[-1]}: of an earlier version, which this one cannot resume; training begins again at step 0 and"
            " keeps it until the first new checkpoint; to resume it, stop this and use that version"
        )
    for made in ladder.decisions:
        stage.events.say(f"train {name}: an earlier start ran out of memory; its change was {made['value']}")
    with record_seconds(work, stage.path(*folder_parts(name)), node):
        writes = node is None or node.rank == 0
        finished = work / "finished" / name
        trained = writes and trained_key(finished) == key  # a kill came just before it was moved to its place
        if writes and not trained:
            remove(finished.parent)
        while not trained:
            try:
                job = _job(stage, adapter, key, plan, attempt, node, connector)
                speed = processes.train(job, plan.processes_here, plan.target.environment, plan.share_of_peak)
            except MemoryRanOutError as error:
                _wait_for_memory(stage, processes.gpus_before, error.processes)  # a later adapter needs it, too
                if error.earlier_jobs:  # they may have held memory that new processes do not
                    stage.events.say(
                        f"train {name}: out of memory {error.shortage} in processes that had trained others; new ones"
                        " try the same"
                    )
                    continue
                attempt = _next_attempt(stage, name, ladder, attempt, error, node)
                continue
            if speed is not None:
                _add_speed(stage, name, speed, plan)
            trained = True
        if writes:
            publish(finished, stage.path(*folder_parts(name)), stage.folder)


@contextmanager
def record_seconds(work: Path, adapter: Path, node: Node | None) -> Iterator[None]:
    """Add the seconds that this context takes to those of an adapter's earlier starts. A killed start adds none.

    The sum is in `work`/seconds.json and, once the adapter is finished, in `adapter`/timing.json. With several nodes,
    only node 0 records it: it owns `work` and removes it at the end.
    """
    if node is not None and node.rank > 0:
        yield
        return
    file, began = work / "seconds.json", time.monotonic()
    try:
        yield
    finally:
        seconds = (read_json(file) or {"seconds": 0.0})["seconds"] + time.monotonic() - began
        write_json(file, {"seconds": round(seconds, 3)})
    write_json(adapter / "timing.json", {**(read_json(adapter / "timing.json") or {}), "seconds": round(seconds, 3)})


def _add_speed(stage: Stage, name: str, speed: float, plan: Plan) -> None:
    """Add a training's speed, in tokens per second, to the manifest, and print it."""
    stage.facts.setdefault("tokens_per_second", {})[name] = round(speed, 1)
    share, of_peak = plan.share_of_peak(speed), ""
    if share is not None:
        stage.facts.setdefault("share_of_peak", {})[name] = round(share, 3)
        of_peak = f", {share:.0%} of the GPUs' peak"
    stage.events.say(f"train {name}: {speed:,.0f} tokens/s{of_peak}")


def _next_attempt(
    stage: Stage, name: str, ladder: Ladder, attempt: Attempt, error: MemoryRanOutError, node: Node | None
) -> Attempt:
    """Add the ladder's next change to ladder.json and print it, after memory ran out. Returns the next attempt.

    Raises DoesNotFitError if no change is left, or if several nodes train together: ladder.json is in node 0's folder,
    so at their next start all of them apply the change.
    """
    shortage = error.shortage
    change = next_rung(attempt, shortage.during, shortage.one_by_one)
    if change is None:
        last = "" if shortage.during == "loading" else ", and nothing is left to reduce"
        raise DoesNotFitError(
            f"training {name}: out of memory {shortage}{last}; {memory_advice(attempt)}; log: {stage.path('log.txt')}"
        )
    after = ladder.add_rung(name, shortage, change, attempt)
    made = ladder.decisions[-1]  # the manifest takes it from training.json
    if node is not None:  # all nodes must start the next attempt together
        raise DoesNotFitError(
            f"training {name}: out of memory {shortage}; start all {node.count} nodes again, which resume with less:"
            f" {made['value']}"
        )
    stage.events.emit("decision", **made)
    stage.events.say(f"{made['what']}: {made['value']} ({made['why']})")
    return after


def _wait_for_memory(stage: Stage, before: tuple[Gpu, ...], processes: tuple[int, ...]) -> None:
    """Wait until the GPUs have freed the memory of these ended processes, at most MEMORY_PATIENCE seconds.

    Prints how long it waited. `before` are the GPUs as they were before these processes started; without any, does not
    wait. Raises InterruptedRunError if the stage is asked to stop.
    """
    if not before:
        return
    began = time.monotonic()
    free_before = {gpu.uuid: gpu.memory_free - MEMORY_SLACK for gpu in before}
    while True:
        stage.stop.check()
        held = [gpu for gpu in probe().gpus if _is_still_held(gpu, processes, free_before.get(gpu.uuid, 0))]
        waited = time.monotonic() - began
        if not held:
            stage.events.say(f"GPU memory is free again after {waited:.1f} s")
            return
        if waited > MEMORY_PATIENCE:
            cards = ", ".join(f"{gpu}: {gpu.memory_free / GIB:.1f} GiB free" for gpu in held)
            stage.events.say(f"GPU memory is still held after {waited:.0f} s ({cards}); training continues anyway")
            return
        time.sleep(0.5)


def _is_still_held(gpu: Gpu, processes: tuple[int, ...], free_before: int) -> bool:
    """Whether ended processes still hold a GPU's memory: the driver lists them, or less than `free_before` bytes are
    free and no other process explains it."""
    if any(one.pid in processes for one in gpu.processes):
        return True
    # in a container, the driver may list processes with other ids or none at all; if it lists and names every process,
    # other programs hold the missing memory
    others_are_known = bool(gpu.processes) and all(one.name != "?" for one in gpu.processes)
    return gpu.memory_free < free_before and not others_are_known


def _job(
    stage: Stage,
    adapter: Adapter,
    key: str,
    plan: Plan,
    attempt: Attempt,
    node: Node | None,
    connector: tuple[Path, str] | None,
) -> Job:
    """The job of this machine's training processes. With several nodes, checkpoints and results are in node 0's
    folder."""
    run, recipe, name = stage.run, stage.run.recipe, adapter.name
    own = stage.path("checkpoints", name)
    work = run.path("train", "checkpoints", name) if node else own
    return Job(
        model=run.model(recipe.model.path, "model.path"),
        work=work,
        scratch=own / "scratch",
        adapter=work / "finished" / name,
        run=run.folder,
        key=key,
        mix=adapter,
        train=[run.path("preprocess", "samples", "train.jsonl")],
        validation=[run.path("preprocess", "samples", "validation.jsonl")],
        seed=recipe.seed,
        dtype=plan.way.dtype,
        sharding=plan.way.sharding,
        pass_tokens=attempt.step.pass_tokens,
        processes=attempt.step.processes,
        evaluation_tokens=attempt.evaluation_tokens,
        evaluate=attempt.evaluate,
        use_cpu=not plan.gpus,
        cards=[f"{gpu}, {gpu.uuid}" for gpu in plan.gpus],
        model_settings=recipe.model,
        settings=attempt.settings,
        progress=-1,
        checkpointed_layers=attempt.step.checkpointed_layers,
        connector=connector,
        chat=chat_settings(run),
    )
