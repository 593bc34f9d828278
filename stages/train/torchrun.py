"""Start the training processes of one adapter on this machine, and follow their progress until they end.

A single process starts directly. torchrun starts several, on one machine or more: it gives each its rank, and ends all
of a machine's processes when one fails.
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
"""Seconds that the first machine waits for the last one: a new node of a cluster may have to pull its image first."""


@dataclass
class _Messages:
    """What the training processes sent so far."""

    processes: list[int] = field(default_factory=list)
    """Process ids of those that torchrun started."""
    errors: list[tuple[Exit, str]] = field(default_factory=list)
    """Exit code and text of each process that failed and sent its error, in the order of arrival."""
    shortages: list[Shortage] = field(default_factory=list)
    """Shortage of each process whose GPU ran out of memory."""
    lost: list[str] = field(default_factory=list)
    """Text of each process whose GPU stopped working."""
    tokens: int = 0
    """Tokens of all steps but the first of this start: the first includes the start of CUDA and its kernels."""
    seconds: float = 0.0
    """Duration of the same steps."""
    steps: int = 0
    """Steps of this start."""

    @property
    def tokens_per_second(self) -> float | None:
        """Over all processes; None after fewer than two steps."""
        return self.tokens / self.seconds if self.seconds else None


def train_adapter(stage: Stage, job: Job, here: int, node: Node | None, environment: Mapping[str, str]) -> float | None:
    """Train one adapter with `here` processes on this machine. Returns tokens per second over all processes, or None
    after fewer than two steps.

    Raises the LorryError that fits their exit codes and last messages; MemoryRanOutError if a GPU's memory was too
    small. `environment` holds the variables of the target; a variable that is already set wins.
    """
    received = _Messages()
    if job.processes == 1:
        _train_alone(stage, job, received)
    else:
        _train_together(stage, job, here, node, {**environment, **os.environ}, received)
    return received.tokens_per_second


def _train_alone(stage: Stage, job: Job, received: _Messages) -> None:
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
        _follow(stage, name, reading, received)
        code = worker.wait()
    error = received.errors[-1][1] if received.errors else None
    if code == Exit.DONE:
        return
    if code == Exit.INTERRUPTED:
        raise InterruptedRunError(error or "stopped; run the same command again")
    if received.shortages:
        raise MemoryRanOutError("out of memory", received.shortages[0], (worker.pid,))
    if code < 0:
        ended_by = signal.Signals(-code).name
        raise LorryError(
            f"training {name} was ended by {ended_by}"
            + (" (the kernel does that when memory runs out)" if ended_by == "SIGKILL" else "")
            + f"; run the same command again to resume from the last checkpoint; log: {stage.path('log.txt')}"
        )
    raise _failure(stage, name, Exit(code) if code in tuple(Exit) else Exit.CRASHED, str(error))


class _Workers:
    """The processes that torchrun started. Signals go to them directly: torchrun kills a process that has not ended
    half a minute after a signal, which may be in the middle of a step or of saving."""

    def __init__(self, torchrun_process: "subprocess.Popen[bytes]", processes: list[int]) -> None:
        self._torchrun, self._processes = torchrun_process, processes

    def send_signal(self, sig: int, /) -> None:
        if not self._processes:  # the nodes have not met yet: there is nothing to save
            self._torchrun.send_signal(signal.SIGTERM)
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process, sig)


def _train_together(
    stage: Stage, job: Job, here: int, node: Node | None, environment: Mapping[str, str], received: _Messages
) -> None:
    reading, writing = os.pipe()
    # torchrun passes on only the standard descriptors; standard input is free
    job_file = _write_job(replace(job, progress=0), job.scratch)
    with subprocess.Popen(
        torchrun(job_file, here, node),
        stdin=writing,
        pass_fds=[stage.lock],
        env=environment,
        start_new_session=True,  # Ctrl-C must not reach torchrun either
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
    ) as torchrun_process:
        os.close(writing)
        workers = _Workers(torchrun_process, received.processes)
        stage.stop.pass_on_to(workers, hears_ctrl_c=False)
        _follow(stage, job.adapter.name, reading, received, workers)
        code = torchrun_process.wait()
    if received.shortages:  # before the errors of the processes that then missed it
        raise MemoryRanOutError("out of memory", received.shortages[0], tuple(received.processes))
    if code != Exit.DONE:
        raise _torchrun_error(stage, job.adapter.name, node, received)


def torchrun(job_file: Path, here: int, node: Node | None) -> list[str]:
    """The command that starts `here` processes on this machine. Node rank 0 holds the first process."""
    where = ["--standalone", "--local-addr=127.0.0.1"]  # a container without network cannot look up its own name
    if node is not None:
        host, _, port = node.rendezvous.rpartition(":")
        where = [f"--nnodes={node.count}", f"--node-rank={node.rank}", f"--master-addr={host}", f"--master-port={port}"]
        where += [f"--rdzv-conf=timeout={JOIN_SECONDS}"]
    worker = ["-m", WORKER, str(job_file)]
    return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={here}", *worker]


def _torchrun_error(stage: Stage, name: str, node: Node | None, received: _Messages) -> LorryError:
    """The cause of torchrun's failure, from its processes' messages: torchrun has one exit code for every failure."""
    for code, text in received.errors:
        if code != Exit.INTERRUPTED:
            return _failure(stage, name, code, text)
    texts = received.lost or [text for _, text in received.errors]  # a lost GPU stops the other processes too
    if len(received.processes) > len(received.errors) and not received.lost:
        # one ended without a message, and the others may have stopped because of that
        return LorryError(
            f"a process that trains {name} was ended from outside (the kernel does that when memory runs out); run the"
            f" same command again to resume from the last checkpoint; log: {stage.path('log.txt')}"
        )
    if texts:
        return InterruptedRunError(texts[0])
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


def _follow(stage: Stage, name: str, reading: int, received: _Messages, workers: _Workers | None = None) -> None:
    """Show the processes' progress and collect their messages until the last process ends."""
    activity, loss = f"train {name}", None
    with os.fdopen(reading, "r", encoding="utf-8") as messages:
        for line in messages:
            message = json.loads(line)
            if message["event"] == "step":
                speed = message["tokens"] / message["seconds"] if message["seconds"] > 0 else None
                received.steps += 1
                if received.steps > 1:
                    received.tokens += message["tokens"]
                    received.seconds += message["seconds"]
                shown = {"loss": loss, "tokens_per_second": speed and round(speed, 1), "memory": message["memory"]}
                stage.events.report_progress(activity, message["step"], message["total"], "steps", **shown)
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
                received.processes.append(message["id"])
                if workers is not None and stage.stop.signal is not None:  # it started after the stop
                    workers.send_signal(signal.SIGTERM)
            elif message["event"] == "error":
                received.errors.append((Exit(message["code"]), message["text"]))
                if "lost" in message:
                    received.lost.append(message["text"])
                if "shortage" in message:
                    received.shortages.append(Shortage(**message["shortage"]))


def _write_job(job: Job, folder: Path) -> Path:
    path = folder / "job.json"
    write_json(path, _json_value(asdict(job)))
    return path


def _json_value(value: Any) -> Any:
    """The value with JSON types only."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return value
