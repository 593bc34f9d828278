"""Answers the requests of a server with the transformers engine, in a thread of its own.

Requests that wait for the same model are answered together, as one batch. Later ones wait until the batch is done.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from stages.contract.machine_errors import machine_error
from stages.engines.engine import Completion, StreamingEngine
from stages.models.rendering import Prompt
from stages.serve.loading import Loaded


@dataclass
class Job:
    """One request."""

    model: str
    prompt: Prompt
    stops: tuple[str, ...]
    """Texts that end the completion; they do not belong to it."""
    tell: Callable[[str, Completion | Exception | None], None]
    """A function that gets the text so far; last with the completion, or with the error in its place."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set if nobody waits for the answer any more."""

    def cut(self, text: str) -> tuple[str, bool]:
        """The text up to the first of the stops, and whether it has one."""
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)


class Worker:
    """A thread that answers jobs until it is closed."""

    def __init__(self, models: Mapping[str, Loaded], batch_size: int) -> None:
        """Start the thread. `models` are those that it answers with, by name."""
        self._models, self._batch_size = models, batch_size
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._left: list[Job] = []
        self._closing = threading.Event()
        self.running = 0
        """Number of requests that are being answered."""
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return self._waiting.qsize() + len(self._left)

    def submit(self, job: Job) -> None:
        """Let a job be answered."""
        self._waiting.put(job)

    def close(self, patience: float = 5) -> None:
        """End the jobs that are being answered after their next token, and the thread."""
        self._closing.set()
        self._waiting.put(None)
        self._thread.join(patience)

    def _work(self) -> None:
        """Answer batches until the worker is closed."""
        while batch := self._next_batch():
            self.running = len(batch)
            self._answer(batch)
            self.running = 0

    def _next_batch(self) -> list[Job]:
        """Wait for a job. Returns it with all others that wait for the same model; empty if the worker is closed."""
        while not self._closing.is_set():
            if not self._left:
                job = self._waiting.get()
                self._left += [job] if job is not None else []
            while not self._waiting.empty():
                job = self._waiting.get()
                self._left += [job] if job is not None else []
            self._left = [job for job in self._left if not job.cancelled.is_set()]
            batch = [job for job in self._left if job.model == self._left[0].model][: self._batch_size]
            if batch:
                self._left = [job for job in self._left if job not in batch]
                return batch
        return []

    def _answer(self, batch: list[Job]) -> None:
        """Answer jobs of one model together. If memory runs out, answer each half alone."""
        engine, adapter = self._models[batch[0].model]

        def shown(place: int, text: str) -> bool:
            """Tell a job its text so far. Returns whether it goes on."""
            text, stopped = batch[place].cut(text)
            if not stopped:
                batch[place].tell(text, None)
            return not (stopped or batch[place].cancelled.is_set() or self._closing.is_set())

        try:
            asked = [job.prompt for job in batch]
            if isinstance(engine, StreamingEngine):
                found = engine.stream(asked, adapter, shown)
            else:
                found = engine.generate(asked, adapter)
        except Exception as error:  # noqa: BLE001 - whatever fails, the server answers the next request
            if len(batch) > 1:
                for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    self._answer(half)
                return
            batch[0].tell("", machine_error(error) or error)
            return
        for job, completion in zip(batch, found, strict=True):
            text, stopped = job.cut(completion.text)
            job.tell(
                text, replace(completion, text=text, finish_reason="stop" if stopped else completion.finish_reason)
            )
