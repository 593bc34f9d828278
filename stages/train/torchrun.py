"""Start the training processes of one adapter on this machine, and follow their progress until they end.

One process is started as it is. Several, or several machines, are started by torchrun, which gives each its rank and
ends all of this machine's when one fails.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from stages.contract.errors import Exit, InterruptedRunError, LorryError
from stages.contract.files import write_json
from stages.contract.part import Node
from stages.contract.stage import Stage
from stages.contract.stop import die_with_parent
from stages.train.job import Job
from stages.train.ladder import MemoryRanOutError, Shortage

WORKER = "stages.train.worker"
"""The module that the processes run."""

JOIN_SECONDS = 900
"""How long the first machine waits for the last one: a new node of a cluster may have to fetch its image first."""


@dataclass
class _Heard:
    """What the processes have told."""

    processes: list[int] = field(default_factory=list)
    """Process ids, of those that torchrun started."""
    errors: list[tuple[Exit, str]] = field(default_factory=list)
    """Exit code and text of each process that failed and could say so, the first one first."""
    shortages: list[Shortage] = field(default_factory=list)
    """Those of them that ran out of memory on their cards."""
    lost: list[str] = field(default_factory=list)
    """What those said whose cards fell away."""
    tokens: int = 0
    seconds: float = 0.0
    """Of all steps but the first of this start, which has CUDA's and the kernels' own start in it."""
    steps: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


def train_adapter(stage: Stage, job: Job, here: int, node: Node | None, environment: Mapping[str, str]) -> float | None:
    """Train one adapter with `here` processes on this machine; returns tokens per second over all of them, where there
    was more than one step.

    Raises what their exit codes and last words say; MemoryRanOutError when a card's memory was too small.
    `environment` has what the cards' target asks for; what is set already wins.
    """
    heard = _Heard()
    if job.processes == 1:
        _train_alone(stage, job, heard)
    else:
        _train_together(stage, job, here, node, {**environment, **os.environ}, heard)
    return heard.tokens_per_second


def _train_alone(stage: Stage, job: Job, heard: _Heard) -> None:
    name = job.adapter.name
    reading, writing = os.pipe()
    job_file = _write_job(replace(job, progress=writing), job.work)
    with subprocess.Popen(
        [sys.executable, "-m", WORKER, str(job_file)],
        pass_fds=[writing, stage.lock],  # a worker that outlives this process still holds the stage
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
    ) as worker:
        os.close(writing)
        stage.stop.pass_on_to(worker)
        _follow(stage, name, reading, heard)
        code = worker.wait()
    error = heard.errors[-1][1] if heard.errors else None
    if code == Exit.DONE:
        return
    if code == Exit.INTERRUPTED:
        raise InterruptedRunError(error or "stopped; run the same command again")
    if heard.shortages:
        raise MemoryRanOutError("out of memory", heard.shortages[0], (worker.pid,))
    if code < 0:
        ended_by = signal.Signals(-code).name
        raise LorryError(
            f"training {name} was ended by {ended_by}"
            + (" (the kernel does that when memory runs out)" if ended_by == "SIGKILL" else "")
            + f"; run the same command again to go on from the last checkpoint; log: {stage.path('log.txt')}"
        )
    raise _failure(stage, name, Exit(code) if code in tuple(Exit) else Exit.CRASHED, str(error))


class _Workers:
    """The processes that torchrun started. They get signals directly: torchrun kills what has not ended half a minute
    after one, which may be in the middle of a step or of saving."""

    def __init__(self, launcher: "subprocess.Popen[bytes]", processes: list[int]) -> None:
        self._launcher, self._processes = launcher, processes

    def send_signal(self, sig: int, /) -> None:
        if not self._processes:  # the nodes have not met yet: nothing to save
            self._launcher.send_signal(signal.SIGTERM)
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process, sig)


def _train_together(
    stage: Stage, job: Job, here: int, node: Node | None, environment: Mapping[str, str], heard: _Heard
) -> None:
    reading, writing = os.pipe()
    # torchrun hands no other descriptor than the standard ones on, and nobody reads the standard input
    job_file = _write_job(replace(job, progress=0), job.scratch)
    with subprocess.Popen(
        torchrun(job_file, here, node),
        stdin=writing,
        pass_fds=[stage.lock],
        env=environment,
        start_new_session=True,  # Ctrl-C must not reach torchrun either
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
    ) as launcher:
        os.close(writing)
        workers = _Workers(launcher, heard.processes)
        stage.stop.pass_on_to(workers, hears_ctrl_c=False)
        _follow(stage, job.adapter.name, reading, heard, workers)
        code = launcher.wait()
    if heard.shortages:  # before the errors of those whom the one that ran out left alone
        raise MemoryRanOutError("out of memory", heard.shortages[0], tuple(heard.processes))
    if code != Exit.DONE:
        raise _why(stage, job.adapter.name, node, heard)


def torchrun(job_file: Path, here: int, node: Node | None) -> list[str]:
    """The command that starts `here` processes on this machine. With nodes, that of rank 0 is the first."""
    where = ["--standalone", "--local-addr=127.0.0.1"]  # a container without network cannot look up its own name
    if node is not None:
        host, _, port = node.rendezvous.rpartition(":")
        where = [f"--nnodes={node.count}", f"--node-rank={node.rank}", f"--master-addr={host}", f"--master-port={port}"]
        where += [f"--rdzv-conf=timeout={JOIN_SECONDS}"]
    worker = ["-m", WORKER, str(job_file)]
    return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={here}", *worker]


def _why(stage: Stage, name: str, node: Node | None, heard: _Heard) -> LorryError:
    """What made torchrun fail, by what its processes told: it has one exit code for everything."""
    for code, text in heard.errors:
        if code != Exit.INTERRUPTED:
            return _failure(stage, name, code, text)
    told = heard.lost or [text for _, text in heard.errors]  # where a card fell away, the others stopped for that
    if len(heard.processes) > len(heard.errors) and not heard.lost:
        # one died without a word, and others may have stopped for that
        return LorryError(
            f"a process that trains {name} was ended from outside (the kernel does that when memory runs out); run the"
            f" same command again to go on from the last checkpoint; log: {stage.path('log.txt')}"
        )
    if told:
        return InterruptedRunError(told[0])
    if stage.stop.signal is not None:
        return InterruptedRunError(f"stopped by {stage.stop.signal.name}; run the same command again")
    if node is not None:
        return InterruptedRunError(
            f"the {node.count} nodes did not meet at {node.rendezvous}; start this command on each of them within"
            f" {JOIN_SECONDS // 60} minutes; log: {stage.path('log.txt')}"
        )
    return _failure(stage, name, Exit.CRASHED, "torchrun started no process")


def _failure(stage: Stage, name: str, code: Exit, text: str) -> LorryError:
    failure = LorryError(f"training {name} failed: {text}; log: {stage.path('log.txt')}")
    failure.exit_code = code
    return failure


def _follow(stage: Stage, name: str, reading: int, heard: _Heard, workers: _Workers | None = None) -> None:
    """Show the processes' progress, and keep what the end is judged by, until the last of them ends."""
    activity, loss = f"train {name}", None
    with os.fdopen(reading, "r", encoding="utf-8") as messages:
        for line in messages:
            message = json.loads(line)
            if message["event"] == "step":
                speed = message["tokens"] / message["seconds"] if message["seconds"] > 0 else None
                heard.steps += 1
                if heard.steps > 1:
                    heard.tokens += message["tokens"]
                    heard.seconds += message["seconds"]
                shown = {"loss": loss, "tokens_per_second": speed and round(speed, 1), "memory": message["memory"]}
                stage.events.progress(activity, message["step"], message["total"], "steps", **shown)
            elif message["event"] == "loss":
                loss = message["loss"]
                stage.events.emit("loss", adapter=name, step=message["step"], loss=loss)
            elif message["event"] == "loaded":
                resumed = f", resuming from {message['resumed_from']}" if message["resumed_from"] else ""
                stage.events.say(f"{activity}: {message['samples']['train']} samples{resumed}")
                if resumed:
                    why = name if message["random_states"] else f"{name}, with new random numbers for its dropout"
                    stage.decisions.append({"what": "resumed", "value": message["resumed_from"], "why": why})
            elif message["event"] == "process":
                heard.processes.append(message["id"])
                if workers is not None and stage.stop.signal is not None:  # it came after the stop
                    workers.send_signal(signal.SIGTERM)
            elif message["event"] == "error":
                heard.errors.append((Exit(message["code"]), message["text"]))
                if "lost" in message:
                    heard.lost.append(message["text"])
                if "shortage" in message:
                    heard.shortages.append(Shortage(**message["shortage"]))


def _write_job(job: Job, folder: Path) -> Path:
    path = folder / "job.json"
    write_json(path, _plain(asdict(job)))
    return path


def _plain(value: Any) -> Any:
    """A job as JSON values."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return value
