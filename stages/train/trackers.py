"""Sends a training's figures to trackers (`train.report_to`): TensorBoard, and Weights & Biases and MLflow where the
user has installed them.

The stage's own process sends them, from the entries that the training process reports. Each row goes into a journal
first, `train/trackers/<adapter>.jsonl`, so a resumed training sends no row twice. TensorBoard's files are written from
the journal at each start. Nothing here ends a training: a tracker that fails is left out, with a line.
"""

import importlib.util
import netrc
import os
import socket
import time
import urllib.parse
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from stages.contract.files import JsonlJournal, remove
from stages.contract.stage import Stage

TRAINING = {
    **{"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm"},
    **{"token_acc": "train/token_accuracy", "epoch": "train/epoch"},
}
"""Names in trackers of what a log entry of training has."""

VALIDATION = {"eval_loss": "validation/loss", "eval_token_acc": "validation/token_accuracy"}
"""Names in trackers of what a log entry of an evaluation has."""

REACH_SECONDS = 3.0
"""Longest wait for an answer of the machine that a tracker would send to."""

PROJECT = "lorry"
"""Name of the project or experiment in trackers, unless their own environment variables name another."""


class Tracker(Protocol):
    """A place that figures go to."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of an optimizer step, by name."""

    def close(self, done: bool) -> None:
        """Send what is left. `done`: the training came to its end."""


def missing_trackers(names: Sequence[str]) -> list[str]:
    """A line for each of these trackers whose library is not installed here."""
    return [
        f"train.report_to: {name} is not installed here, so nothing is sent to it; run `pip install {name}`, or remove"
        " it from the list"
        for name in names
        if not _is_installed(name)
    ]


def _is_installed(name: str) -> bool:
    """Whether a library is installed. A folder of its name, such as those that wandb writes, is none."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


class Trackers:
    """The trackers of one training."""

    def __init__(self, stage: Stage, name: str, key: str, wanted: Sequence[str]) -> None:
        """Prepare, without opening a tracker. `name` and `key` are the adapter's; `wanted` is `train.report_to`."""
        self._stage, self._name, self._key = stage, name, key
        self._wanted = [one for one in wanted if _is_installed(one)]
        self._open: dict[str, Tracker] = {}
        self._journal: JsonlJournal | None = None
        self._last: dict[str, int] = {}  # the last step of each kind of row in the journal
        self._tokens = self._seconds = 0.0
        self._memory: int | None = None

    def begin(self, resumes: bool) -> None:
        """Open the trackers. If the training resumes, rows that an earlier start sent are not sent again."""
        if not self._wanted:
            return
        with self._ignoring("the journal", None):
            self._journal, rows = self._open_journal(resumes)
        if self._journal is None:
            return
        identity = str(self._journal.records[0]["id"])
        for name in self._wanted:
            with self._ignoring(name, name):
                self._open[name] = KINDS[name](self._stage, self._name, identity, rows)

    def _open_journal(self, resumes: bool) -> tuple[JsonlJournal, list[dict[str, Any]]]:
        """Open the journal, and return it with the rows that it has: none, unless the same training resumes."""
        path = self._stage.path("trackers", f"{self._name}.jsonl")
        journal = JsonlJournal(path)
        if not resumes or not journal.records or journal.records[0]["key"] != self._key:
            journal.close()
            remove(path)
            journal = JsonlJournal(path)
            journal.append([{"key": self._key, "id": uuid.uuid4().hex[:16]}])
        rows = journal.records[1:]
        for row in rows:
            self._last[row["kind"]] = row["step"]
        return journal, rows

    def add_step(self, tokens: int, seconds: float, memory: int | None) -> None:
        """Count a step for the speed in the next row."""
        self._tokens += tokens
        self._seconds += seconds
        self._memory = memory

    def add_entry(self, entry: Mapping[str, Any]) -> None:
        """Send a log entry of training or of an evaluation, unless it was sent before."""
        if self._journal is None:
            return
        kind, names = ("validation", VALIDATION) if "eval_loss" in entry else ("train", TRAINING)
        figures = {name: float(entry[key]) for key, name in names.items() if key in entry}
        if kind == "train":
            if self._seconds:
                figures["train/tokens_per_second"] = self._tokens / self._seconds
            if self._memory:
                figures["train/memory_gib"] = self._memory / 2**30
            self._tokens = self._seconds = 0.0
        step = int(entry["step"])
        if step <= self._last.get(kind, 0):
            return
        self._last[kind] = step
        with self._ignoring("the journal", None):
            self._journal.append([{"kind": kind, "step": step, "time": time.time(), "figures": figures}])
        for name, tracker in list(self._open.items()):
            with self._ignoring(name, name):
                tracker.log(step, figures)

    def end(self, done: bool) -> None:
        """Close the trackers. `done`: the training came to its end."""
        for name, tracker in list(self._open.items()):
            with self._ignoring(name, name):
                tracker.close(done)
        self._open.clear()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _ignoring(self, what: str, tracker: str | None) -> "_Ignored":
        """Within this context, an error becomes a line, and the tracker is left out from then on."""

        def leave_out(error: Exception) -> None:
            if tracker is not None:
                self._open.pop(tracker, None)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._stage.events.say(
                f"train {self._name}: {what} fails ({text}), so nothing more is sent to it; training goes on"
            )

        return _Ignored(leave_out)


class _Ignored:
    """Turns every error in its context into a call."""

    def __init__(self, report: Callable[[Exception], None]) -> None:
        self._report = report

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self._report(error)
            return True
        return False


class TensorBoard:
    """Event files in `train/tensorboard/<adapter>/`.

    They are written by tensorboard's own writer, which needs numpy only; torch's writer would import torch into the
    stage's process.
    """

    def __init__(self, stage: Stage, name: str, identity: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows so far; whatever else is in the folder goes. `identity` is not used."""
        from tensorboard.summary import Writer

        folder = stage.path("tensorboard", name)
        remove(folder)
        self._writer = Writer(str(folder))
        for row in rows:
            self._add(row["step"], row["figures"], row["time"])
        self._writer.flush()

    def _add(self, step: int, figures: Mapping[str, float], when: float | None = None) -> None:
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, step, wall_time=when)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures to the disk."""
        self._add(step, figures)
        self._writer.flush()

    def close(self, done: bool) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases. Without network, key or in a container it is written to
    `train/trackers/wandb/`, for `wandb sync`; nothing ever asks for a key."""

    def __init__(self, stage: Stage, name: str, identity: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin or continue the run `identity`."""
        import wandb

        folder = stage.path("trackers")
        folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE") or ("online" if _can_send_to_wandb() else "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=identity,
            name=f"{stage.run.name}/{name}",
            group=stage.run.name,
            dir=str(folder),
            mode=mode,
            resume="allow",
            reinit="finish_previous",
            config=_settings(stage),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=30),
        )
        if mode == "offline":
            place = folder / "wandb"
            stage.events.say(f"train {name}: wandb writes offline; send it with `wandb sync {place}/offline-run-*`")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send figures."""
        self._run.log(dict(figures), step=step)

    def close(self, done: bool) -> None:
        """Finish the run. One that is not done can be continued."""
        self._run.finish(exit_code=0 if done else 1)


def _can_send_to_wandb() -> bool:
    """Whether there is a key for Weights & Biases, and its machine answers. Never in a container."""
    if os.environ.get("LORRY_IMAGE"):
        return False
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    host = urllib.parse.urlsplit(address).hostname or ""
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    with suppress(OSError, netrc.NetrcParseError):
        has_key = has_key or netrc.netrc().authenticators(host) is not None
    return has_key and _answers(address)


def _answers(address: str) -> bool:
    """Whether a machine accepts connections."""
    parts = urllib.parse.urlsplit(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname, port), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False


class Mlflow:
    """A run of MLflow: on the server that MLFLOW_TRACKING_URI names, else in `train/trackers/mlflow/`; in a container
    always there."""

    def __init__(self, stage: Stage, name: str, identity: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Begin or continue the run with the tag `lorry.id`."""
        # else a server that does not answer would be tried for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        folder = stage.path("trackers", "mlflow")
        server = None if os.environ.get("LORRY_IMAGE") else os.environ.get("MLFLOW_TRACKING_URI")
        if server is None:
            folder.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=server or f"sqlite:///{folder}/mlflow.db")
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(title)
        place = None if server else (folder / "artifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(title, artifact_location=place)
        runs = self._client.search_runs([experiment], filter_string=f"tags.`lorry.id` = '{identity}'")
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"lorry.id": identity, "lorry.run": stage.run.name, "lorry.adapter": name}
        self._id = self._client.create_run(experiment, run_name=f"{stage.run.name}/{name}", tags=tags).info.run_id
        self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in _settings(stage).items()])

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send figures."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def close(self, done: bool) -> None:
        """End the run. One that is not done can be continued."""
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


def _settings(stage: Stage) -> dict[str, Any]:
    """The settings of the training, for trackers."""
    recipe = stage.run.recipe
    train = recipe.train.model_dump(mode="json", exclude={"adapters", "connector", "report_to"})
    return {"task": recipe.task, "model": recipe.model.path, "seed": recipe.seed, **train}


KINDS: dict[str, type[TensorBoard] | type[Wandb] | type[Mlflow]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}
"""The trackers by their names in `train.report_to`."""
