"""The training processes on this machine: start them, give them one adapter after the other, follow their progress.

Lorry starts a single process itself. torchrun starts several processes, on one machine or more: it gives each its rank,
and ends all processes of a machine if one fails. Processes that have trained an adapter keep the base on their GPUs for
the next one. All processes of a machine read their jobs from a folder:

    <checkpoints>/.jobs/<number>.json   the jobs of these processes, from 1 on; they end when the folder is removed
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from stages.contract.errors import Exit, InterruptedRunError, LorryError
from stages.contract.files import remove
from stages.contract.part import Node
from stages.contract.stage import Stage
from stages.contract.stop import begin_child, die_with_parent
from stages.hardware.probe import Gpu, probe
from stages.train.job import Job
from stages.train.ladder import MemoryRanOutError, Shortage
from stages.train.trackers import Trackers

WORKER = "stages.train.worker"
"""The module that each training process runs."""

MEET_SECONDS = 300
"""Seconds that node 0 waits for the other nodes, with its GPUs idle. Started again, as by a Job of Kubernetes, it waits
for them again."""

JOIN_SECONDS = 900
"""Seconds that the other nodes wait for node 0. It is longer than the pause before a Job of Kubernetes starts node 0
again, which is at most ten minutes: they are there when it comes back."""

ENDING_SECONDS = 30
"""Seconds in which processes that have no more jobs must end."""


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
    earlier_jobs: int = 0
    """Number of jobs that these processes had done before this one."""

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed over all processes; None after fewer than two steps."""
        return self.tokens / self.seconds if self.seconds else None


class TrainingProcesses:
    """The training processes of a stage on this machine. They end with the context of this object at the latest."""

    def __init__(self, stage: Stage, node: Node | None) -> None:
        self.gpus_before: tuple[Gpu, ...] = ()
        """This machine's GPUs as they were before the newest processes started."""
        self._stage, self._node = stage, node
        self._jobs = stage.path("checkpoints", ".jobs")
        self._running: _Running | None = None
        self._last: Job | None = None  # the last job, if it ended well

    def __enter__(self) -> "TrainingProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def train(
        self, job: Job, here: int, environment: Mapping[str, str], share_of_peak: Callable[[float], float | None]
    ) -> float | None:
        """Train one adapter or the connector with `here` processes on this machine. Returns tokens per second over all
        processes, or None after fewer than two steps.

        Processes that have the job's base on their GPUs train it, or else new ones. `environment` holds the target's
        variables for several processes; they do not replace variables that are already set, and a single process does
        not get them. `share_of_peak` gives the share of the GPUs' peak for a number of tokens per second, or None; it
        is shown with the progress. Raises MemoryRanOutError if a GPU's memory ran out, InterruptedRunError after a stop
        or the loss of a GPU or node, and LorryError for every other failure, with the process's exit code if it has
        one.
        """
        name, last, self._last = job.adapter.name, self._last, None
        if self._running is not None and (self._running.base != job.base or self._running.process.poll() is not None):
            self.end()
        if self._running is not None:
            self._running.jobs, self._running.is_idle = self._running.jobs + 1, False
            job.write(self._jobs / f"{self._running.jobs}.json")
        else:
            if last is not None:
                self._stage.events.say(f"train {name}: loads the base again{self._why_again(last, job)}")
            self._running = self._start(job, here, environment)
        running = self._running
        received = running.received = _Messages(running.received.processes, earlier_jobs=running.jobs - 1)
        workers = None if job.processes == 1 else _Workers(running.process, received, self._node)
        self._stage.stop.pass_on_to(workers or running.process)
        trackers = Trackers(self._stage, name, job.key, job.settings.report_to)
        done = False
        try:
            done = _follow_progress(self._stage, name, running.messages, received, trackers, share_of_peak, workers)
        finally:
            trackers.end(done)
        if done:
            self._stage.stop.pass_on_to(None)
            running.is_idle = True
        else:
            code, self._running = running.process.wait(), None
            self._stage.stop.pass_on_to(None)
            running.messages.close()
            if workers is not None:
                _raise_torchrun_error(self._stage, name, code, self._node, received)
            else:
                _raise_process_error(self._stage, name, code, running.process.pid, received)
        self._last = job
        return received.tokens_per_second

    def end(self) -> None:
        """End the processes, and wait until they have ended. Those that are still training are killed."""
        running, self._running = self._running, None
        remove(self._jobs)
        if running is None:
            return
        with running.messages:
            if not running.is_idle:
                running.process.kill()
            try:
                running.process.wait(ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()

    def _start(self, job: Job, here: int, environment: Mapping[str, str]) -> "_Running":
        """Start `here` processes with their first job. It is their only one if the base is not kept; on several nodes
        it is not: only the first process of node 0 says when a job is done."""
        self.gpus_before = () if job.use_cpu else probe().gpus
        remove(self._jobs)  # a killed start may have left it
        jobs = self._jobs if job.base is not None and self._node is None else self._jobs / "1.json"
        reading, writing = os.pipe()
        if job.processes == 1:
            replace(job, progress=writing).write(self._jobs / "1.json")
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(jobs)],
                pass_fds=[writing, self._stage.lock],  # a worker that outlives this process must still hold the lock
                process_group=0,
                preexec_fn=partial(begin_child, os.getpid()),  # noqa: PLW1509 - no other thread runs here
            )
        else:
            # torchrun passes only the standard descriptors to its processes, and standard input is not used otherwise
            replace(job, progress=0).write(self._jobs / "1.json")
            if self._node is not None:
                self._stage.events.say(f"train {job.adapter.name}: {_whom_it_waits_for(self._node)}")
            process = subprocess.Popen(
                torchrun_command(jobs, here, self._node),
                stdin=writing,
                pass_fds=[self._stage.lock],
                env={**environment, **os.environ},
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
            )
        os.close(writing)
        return _Running(process, os.fdopen(reading, "r", encoding="utf-8"), job.base)

    def _why_again(self, last: Job, job: Job) -> str:
        """Why new processes load the base for a job, after processes that did their last job well."""
        if last.connector != job.connector:
            return ", with the trained connector"
        if self._node is not None:
            return f", as {self._node.count} nodes train together"
        return ", as it is sharded over the GPUs" if job.is_sharded else ""


@dataclass
class _Running:
    """Processes that run."""

    process: "subprocess.Popen[bytes]"
    """The training process, or torchrun."""
    messages: IO[str]
    base: tuple[Any, ...] | None
    """`Job.base` of their jobs."""
    jobs: int = 1
    """Number of jobs that they got."""
    received: _Messages = field(default_factory=_Messages)
    """What they have sent about the newest job."""
    is_idle: bool = False
    """Whether they wait for a job."""


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


def _raise_process_error(stage: Stage, name: str, code: int, process: int, received: _Messages) -> None:
    """Raise the error for a single process that ended with this code, unless it is done. `process` is its id."""
    error = received.errors[-1][1] if received.errors else None
    if code == Exit.DONE:
        return
    if code == Exit.INTERRUPTED or (code < 0 and stage.stop.signal is not None):
        raise InterruptedRunError(error or f"training {name}: stopped; run the same command again to resume")
    if received.shortages:
        raise MemoryRanOutError("out of memory", received.shortages[0], (process,), received.earlier_jobs)
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


def _raise_torchrun_error(stage: Stage, name: str, code: int, node: Node | None, received: _Messages) -> None:
    """Raise the error for several processes after torchrun ended with this code, unless they are done."""
    if received.shortages:  # checked first: the other processes failed because of it
        raise MemoryRanOutError(
            "out of memory", received.shortages[0], tuple(received.processes), received.earlier_jobs
        )
    if code != Exit.DONE:
        raise _torchrun_error(stage, name, node, received)


def torchrun_command(jobs: Path, here: int, node: Node | None) -> list[str]:
    """The torchrun command that starts `here` training processes on this machine, which do the job in a
    file or those in a folder. On several nodes, their ranks follow the order of the nodes."""
    where = ["--standalone", "--local-addr=127.0.0.1"]  # a container without network cannot resolve its own name
    if node is not None:
        host, _, port = node.rendezvous.rpartition(":")
        where = [f"--nnodes={node.count}", f"--node-rank={node.rank}", f"--master-addr={host}", f"--master-port={port}"]
        where += [f"--rdzv-conf=timeout={MEET_SECONDS}"]
    worker = ["-m", WORKER, str(jobs)]
    return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={here}", *worker]


def _whom_it_waits_for(node: Node) -> str:
    """A line on the nodes that a node meets before it trains."""
    others = [str(rank) for rank in range(node.count) if rank != node.rank]
    names = f"node {others[0]}" if len(others) == 1 else f"nodes {', '.join(others[:-1])} and {others[-1]}"
    return f"waits for {names} at {node.rendezvous}, up to {MEET_SECONDS // 60} minutes"


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
            f"{node.rendezvous}: the {node.count} nodes did not meet there in {MEET_SECONDS // 60} minutes; start this"
            f" command on each node again (a Job of Kubernetes does so by itself); log: {stage.path('log.txt')}"
        )
    return _training_error(stage, name, Exit.CRASHED, "torchrun started no process")


def _training_error(stage: Stage, name: str, code: Exit, text: str) -> LorryError:
    """The error for a failed training: `text` with the log's path, and the process's exit code."""
    failure = LorryError(f"training {name} failed: {text}; log: {stage.path('log.txt')}")
    failure.exit_code = code
    return failure


def _follow_progress(
    stage: Stage,
    name: str,
    messages: IO[str],
    received: _Messages,
    trackers: Trackers,
    share_of_peak: Callable[[float], float | None],
    workers: _Workers | None = None,
) -> bool:
    """Print the processes' progress, send it to trackers, and add their messages to `received`, until they are done
    with their job.

    Returns whether they are: false if the last process ended before. Adds a decision to the stage if training resumes
    from a checkpoint. `workers` that start after a stop get a SIGTERM.
    """
    activity, loss = f"train {name}", None
    for line in messages:
        message = json.loads(line)
        if message["event"] == "step":
            speed = message["tokens"] / message["seconds"] if message["seconds"] > 0 else None
            received.steps += 1
            if received.steps > 1:
                received.tokens += message["tokens"]
                received.seconds += message["seconds"]
            trackers.add_step(message["tokens"], message["seconds"], message["memory"])
            share = share_of_peak(speed) if speed else None
            stage.events.report_progress(
                activity,
                message["step"],
                message["total"],
                "steps",
                loss=loss,
                tokens_per_second=speed and round(speed, 1),
                share_of_peak=share and round(share, 3),
                memory=message["memory"],
            )
        elif message["event"] == "entry":
            entry = message["entry"]
            trackers.add_entry(entry)
            if "loss" in entry:
                loss = entry["loss"]
                stage.events.emit("loss", adapter=name, step=entry["step"], loss=loss)
        elif message["event"] == "loaded":
            trackers.begin(resumes=message["resumed_from"] is not None)
            _say_loaded(stage, name, message)
        elif message["event"] == "done":
            return True
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
    return False


def _say_loaded(stage: Stage, name: str, message: dict[str, Any]) -> None:
    """Print what a process loaded before it trains the adapter `name`, and record what it resumes from."""
    activity = f"train {name}"
    resumed = f", resuming from {message['resumed_from']}" if message["resumed_from"] else ""
    base = "" if message["loads_base"] else ", on the base that is loaded"
    stage.events.say(f"{activity}: {message['samples']['train']} samples{resumed}{base}")
    if message["one_sample_a_pass"]:
        stage.events.say(f"{activity}: each pass has one sample, because {message['one_sample_a_pass']}")
    if resumed:
        stage.decisions.append({"what": "resumed", "value": message["resumed_from"], "why": name})
