"""Start the training processes of one adapter on this machine, and follow their progress until they end.

Lorry starts a single process itself. torchrun starts several processes, on one machine or more: it gives each its rank,
and ends all processes of a machine if one fails.
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
from stages.contract.stop import begin_child, die_with_parent
from stages.train.job import Job
from stages.train.ladder import MemoryRanOutError, Shortage

WORKER = "stages.train.worker"
"""The module that each training process runs."""

JOIN_SECONDS = 900
"""Seconds that nodes wait for one another: a new machine in a cluster may have to pull its image first."""


@dataclass
class _Messages:
    """What the training processes have sent so far."""

    processes: list[int] = field(default_factory=list)
    """Ids of the processes that torchrun started."""
    errors: list[tuple[Exit, str]] = field(default_factory=list)
    """Exit code and text of each error that a process sent, in the order of arrival."""
    shortages: list[Shortage] = field(default_factory=list)
    """Those errors that mean out of memory, in the order of arrival."""
    lost: list[str] = field(default_factory=list)
    """Texts of those errors that mean a GPU stopped working."""
    tokens: int = 0
    """Tokens of all steps of this start except the first, which includes the start of CUDA and its kernels."""
    seconds: float = 0.0
    """Duration of the same steps."""
    steps: int = 0
    """Number of steps of this start."""

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed over all processes; None after fewer than two steps."""
        return self.tokens / self.seconds if self.seconds else None


def train_adapter(stage: Stage, job: Job, here: int, node: Node | None, environment: Mapping[str, str]) -> float | None:
    """Train one adapter with `here` processes on this machine. Returns tokens per second over all processes, or None
    after fewer than two steps.

    `environment` holds the target's variables for several processes; they do not replace variables that are already
    set, and a single process does not get them. Raises MemoryRanOutError if a GPU's memory ran out, InterruptedRunError
    after a stop or the loss of a GPU or node, and LorryError for every other failure, with the process's exit code if
    it has one.
    """
    received = _Messages()
    if job.processes == 1:
        _train_alone(stage, job, received)
    else:
        _train_together(stage, job, here, node, {**environment, **os.environ}, received)
    return received.tokens_per_second


def _train_alone(stage: Stage, job: Job, received: _Messages) -> None:
    """Train in one process, without torchrun. Raises the errors of `train_adapter`."""
    name = job.adapter.name
    reading, writing = os.pipe()
    job_file = _write_job(replace(job, progress=writing), job.work)
    with subprocess.Popen(
        [sys.executable, "-m", WORKER, str(job_file)],
        pass_fds=[writing, stage.lock],  # a worker that outlives this process must still hold the stage's lock
        process_group=0,
        preexec_fn=partial(begin_child, os.getpid()),  # noqa: PLW1509 - no other thread runs here
    ) as worker:
        os.close(writing)
        stage.stop.pass_on_to(worker)
        _follow_progress(stage, name, reading, received)
        code = worker.wait()
        stage.stop.pass_on_to(None)
    error = received.errors[-1][1] if received.errors else None
    if code == Exit.DONE:
        return
    if code == Exit.INTERRUPTED or (code < 0 and stage.stop.signal is not None):
        raise InterruptedRunError(error or f"training {name}: stopped; run the same command again to resume")
    if received.shortages:
        raise MemoryRanOutError("out of memory", received.shortages[0], (worker.pid,))
    if code < 0:
        ended_by = signal.Signals(-code).name
        raise LorryError(
            f"training {name}: ended by {ended_by}"
            + (" (the kernel sends it when memory runs out)" if ended_by == "SIGKILL" else "")
            + f"; run the same command again to resume from the last checkpoint; log: {stage.path('log.txt')}"
        )
    raise _training_error(
        stage, name, Exit(code) if code in tuple(Exit) else Exit.CRASHED, error or f"exit code {code} without a message"
    )


class _Workers:
    """The processes that torchrun started. They get signals directly: torchrun would kill a process half a minute after
    a signal, possibly in the middle of a step or while it saves."""

    def __init__(self, torchrun_process: "subprocess.Popen[bytes]", received: _Messages, node: Node | None) -> None:
        self._torchrun, self._received, self._node = torchrun_process, received, node

    def send_signal(self, sig: int, /) -> None:
        """Send a signal to each process, or SIGTERM to torchrun if no process has started. Kill torchrun, and its
        processes with it, if they have made no step and no other machine takes part."""
        if not self._received.processes:  # the nodes have not met yet: no work is lost
            self._torchrun.send_signal(signal.SIGTERM)
        elif self._node is None and not self._received.steps:  # still loading: no work is lost
            self._torchrun.kill()
            return
        for process in self._received.processes:
            with suppress(ProcessLookupError):
                os.kill(process, sig)


def _train_together(
    stage: Stage, job: Job, here: int, node: Node | None, environment: Mapping[str, str], received: _Messages
) -> None:
    """Train in several processes, which torchrun starts. Raises the errors of `train_adapter`."""
    reading, writing = os.pipe()
    # torchrun passes only the standard descriptors to its processes, and standard input is not used otherwise
    job_file = _write_job(replace(job, progress=0), job.scratch)
    with subprocess.Popen(
        torchrun_command(job_file, here, node),
        stdin=writing,
        pass_fds=[stage.lock],
        env=environment,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
    ) as torchrun_process:
        os.close(writing)
        workers = _Workers(torchrun_process, received, node)
        stage.stop.pass_on_to(workers)
        _follow_progress(stage, job.adapter.name, reading, received, workers)
        code = torchrun_process.wait()
        stage.stop.pass_on_to(None)
    if received.shortages:  # checked first: the other processes failed because of it
        raise MemoryRanOutError("out of memory", received.shortages[0], tuple(received.processes))
    if code != Exit.DONE:
        raise _torchrun_error(stage, job.adapter.name, node, received)


def torchrun_command(job_file: Path, here: int, node: Node | None) -> list[str]:
    """The torchrun command that starts `here` training processes on this machine. On several nodes, their ranks follow
    the order of the nodes."""
    where = ["--standalone", "--local-addr=127.0.0.1"]  # a container without network cannot resolve its own name
    if node is not None:
        host, _, port = node.rendezvous.rpartition(":")
        where = [f"--nnodes={node.count}", f"--node-rank={node.rank}", f"--master-addr={host}", f"--master-port={port}"]
        where += [f"--rdzv-conf=timeout={JOIN_SECONDS}"]
    worker = ["-m", WORKER, str(job_file)]
    return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={here}", *worker]


def _torchrun_error(stage: Stage, name: str, node: Node | None, received: _Messages) -> LorryError:
    """The error that made torchrun fail, from the processes' messages: torchrun has one exit code for all errors."""
    for code, text in received.errors:
        if code != Exit.INTERRUPTED:
            return _training_error(stage, name, code, text)
    if stage.stop.signal is not None:  # torchrun may have ended processes that waited for one that stopped
        return InterruptedRunError(f"training {name}: stopped by {stage.stop.signal.name}; run the same command again")
    texts = received.lost or [text for _, text in received.errors]  # a lost GPU stops the other processes too
    if len(received.processes) > len(received.errors) and not received.lost:
        # one ended without a message, and the others may have stopped because of that
        return LorryError(
            f"training {name}: a process was ended from outside (the kernel does that when memory runs out); run the"
            f" same command again to resume from the last checkpoint; log: {stage.path('log.txt')}"
        )
    if texts:
        return InterruptedRunError(texts[0])
    if node is not None:
        return InterruptedRunError(
            f"{node.rendezvous}: the {node.count} nodes did not meet there; start this command on each of them within"
            f" {JOIN_SECONDS // 60} minutes; log: {stage.path('log.txt')}"
        )
    return _training_error(stage, name, Exit.CRASHED, "torchrun started no process")


def _training_error(stage: Stage, name: str, code: Exit, text: str) -> LorryError:
    """The error for a failed training: `text` with the log's path, and the process's exit code."""
    failure = LorryError(f"training {name} failed: {text}; log: {stage.path('log.txt')}")
    failure.exit_code = code
    return failure


def _follow_progress(
    stage: Stage, name: str, reading: int, received: _Messages, workers: _Workers | None = None
) -> None:
    """Print the processes' progress, and add their messages to `received`, until the last process ends.

    Adds a decision to the stage if training resumes from a checkpoint. `reading` is the file descriptor with the
    messages. `workers` that start after a stop get a SIGTERM.
    """
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
    """Write a job to job.json in a folder, for `Job.read`. Returns the file's path."""
    path = folder / "job.json"
    write_json(path, _json_value(asdict(job)))
    return path


def _json_value(value: Any) -> Any:
    """Convert a value to JSON's types: paths become text, settings become dicts. Returns the result."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return value
