"""Trackers: what a training sends, once, whatever happens to the training or to the tracker."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stages.contract.events import Events
from stages.contract.files import read_jsonl
from stages.contract.recipe import Recipe, load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.contract.stop import StopRequest
from stages.train.torchrun import _follow_progress, _Messages
from stages.train.trackers import Trackers, missing_trackers
from stages.train.trained import LEARNT
from tests.conftest import REPOSITORY

SITE = REPOSITORY / ".venv" / "trackers"
"""Where `make kill-test` puts Weights & Biases and MLflow."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries can be imported."""
    assert (SITE / "wandb").is_dir() and (SITE / "mlflow").is_dir(), "not installed; `make kill-test` installs them"
    monkeypatch.syspath_prepend(SITE)


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny", overrides)


@pytest.fixture
def console() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def stage(tmp_path: Path, console: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "LORRY_IMAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = Run("r", recipe_with(), Roots(tmp_path, tmp_path, tmp_path))
    events = Events(tmp_path / "events.jsonl", "train", console)
    yield Stage(run, "train", events, StopRequest(), lock=-1, output=-1)
    events.close()


def entry(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "loss": 4 - step / 10, "learning_rate": 1e-4, "token_acc": 0.5}


def send(stage: Stage, steps: range, resumes: bool, *names: str, key: str = "a key", done: bool = True) -> None:
    """Send what a start of a training sends: a row every second step, an evaluation every fourth."""
    sent = Trackers(stage, "tuned", key, names or ("tensorboard",))
    sent.begin(resumes)
    for step in steps:
        sent.add_step(100, 0.5, 2 * 2**30)
        if step % 2 == 0:
            sent.add_entry({**entry(step), "grad_norm": 1.5})
        if step % 4 == 0:
            sent.add_entry({"step": step, "epoch": 1.0, "eval_loss": 5 - step / 10, "eval_token_acc": 0.25})
    sent.end(done)


def in_tensorboard(stage: Stage) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of the stage's adapter."""
    return tensorboard_rows(stage.path("tensorboard", "tuned"))


def tensorboard_rows(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard reads a folder."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    found = {}
    for tag in read.Tags()["tensors"]:
        found[tag] = [(one.step, round(float(one.tensor_proto.float_val[0]), 4)) for one in read.Tensors(tag)]
    return found


def test_tensorboard_shows_each_row_with_its_step(stage: Stage) -> None:
    send(stage, range(1, 6), resumes=False)
    assert in_tensorboard(stage) == {
        "train/loss": [(2, 3.8), (4, 3.6)],
        "train/learning_rate": [(2, 0.0001), (4, 0.0001)],
        "train/grad_norm": [(2, 1.5), (4, 1.5)],
        "train/token_accuracy": [(2, 0.5), (4, 0.5)],
        "train/epoch": [(2, 0.2), (4, 0.4)],
        "train/tokens_per_second": [(2, 200.0), (4, 200.0)],
        "train/memory_gib": [(2, 2.0), (4, 2.0)],
        "validation/loss": [(4, 4.6)],
        "validation/token_accuracy": [(4, 0.25)],
    }


def test_a_resumed_training_repeats_no_row_and_another_one_begins_again(stage: Stage) -> None:
    send(stage, range(1, 7), resumes=False, done=False)
    send(stage, range(3, 11), resumes=True)  # from a checkpoint at step 2
    assert in_tensorboard(stage)["train/loss"] == [(2, 3.8), (4, 3.6), (6, 3.4), (8, 3.2), (10, 3.0)]
    assert in_tensorboard(stage)["validation/loss"] == [(4, 4.6), (8, 4.2)]
    send(stage, range(3, 5), resumes=True, key="another key")
    assert in_tensorboard(stage)["train/loss"] == [(4, 3.6)]
    send(stage, range(1, 3), resumes=False)  # --force, or no checkpoint yet
    assert in_tensorboard(stage)["train/loss"] == [(2, 3.8)]


def test_a_kill_in_the_middle_of_a_row_loses_that_row_only(stage: Stage) -> None:
    send(stage, range(1, 7), resumes=False, done=False)
    journal = stage.path("trackers", "tuned.jsonl")
    journal.write_bytes(journal.read_bytes()[:-5])
    send(stage, range(3, 9), resumes=True)
    assert [step for step, _ in in_tensorboard(stage)["train/loss"]] == [2, 4, 6, 8]


def test_a_tracker_that_fails_is_left_out_with_a_line(stage: Stage, console: io.StringIO) -> None:
    stage.path("tensorboard").parent.mkdir(parents=True)
    stage.path("tensorboard").write_text("a file, no folder")
    send(stage, range(1, 9), resumes=False)
    (line,) = console.getvalue().splitlines()
    assert line.startswith("train: train tuned: tensorboard fails (") and line.endswith("training goes on")
    assert len(read_jsonl(stage.path("trackers", "tuned.jsonl"))) == 1 + 4 + 2


def test_no_tracker_writes_nothing(stage: Stage) -> None:
    sent = Trackers(stage, "tuned", "a key", ())
    sent.begin(resumes=False)
    sent.add_entry(entry(2))
    sent.end(done=True)
    assert not stage.folder.exists()


def test_a_library_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "neptunes").mkdir()  # a folder beside the user is no library: wandb writes one of its own name
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = missing_trackers(["tensorboard", "neptunes"])
    assert line.startswith("train.report_to: neptunes is not installed here") and "pip install neptunes" in line


def test_trackers_are_no_part_of_an_adapters_key() -> None:
    plain, other = recipe_with(), recipe_with("train.report_to=[wandb, mlflow]")
    assert other.train.report_to == ["wandb", "mlflow"]
    assert plain.digest() == other.digest() and plain.digest("train") == other.digest("train")
    assert "report_to" not in LEARNT


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a file of Weights & Biases: LevelDB's log format (blocks of 32 KiB) after 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # padding
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


@pytest.mark.long
@pytest.mark.usefixtures("site")
def test_weights_and_biases_writes_offline_and_asks_nobody(stage: Stage, console: io.StringIO) -> None:
    import wandb

    send(stage, range(1, 7), False, "wandb", done=False)
    send(stage, range(3, 11), True, "wandb")
    wandb.teardown()  # its process writes what is left
    from wandb.proto import wandb_internal_pb2

    rows: list[tuple[int, float]] = []
    ids = set()
    for file in sorted(stage.path("trackers", "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                if "train/loss" in items:
                    rows.append((int(items["_step"]), round(float(items["train/loss"]), 4)))
    assert rows == [(2, 3.8), (4, 3.6), (6, 3.4), (8, 3.2), (10, 3.0)]
    assert len(ids) == 1
    assert all("wandb sync" in line for line in console.getvalue().splitlines())


@pytest.mark.long
@pytest.mark.usefixtures("site")
def test_mlflow_writes_into_the_run(stage: Stage, console: io.StringIO) -> None:
    import mlflow

    send(stage, range(1, 7), False, "mlflow", done=False)
    send(stage, range(3, 11), True, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{stage.path('trackers', 'mlflow', 'mlflow.db')}")
    (run,) = client.search_runs([client.get_experiment_by_name("lorry").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    rows = [(one.step, round(one.value, 4)) for one in history]
    assert rows == [(2, 3.8), (4, 3.6), (6, 3.4), (8, 3.2), (10, 3.0)]
    assert run.info.status == "FINISHED" and run.data.params["rank"] == "8"
    assert console.getvalue() == ""


@pytest.mark.long
@pytest.mark.usefixtures("site")
def test_a_server_that_does_not_answer_costs_one_line(
    stage: Stage, console: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    send(stage, range(1, 9), False, "mlflow", "tensorboard")
    (line,) = console.getvalue().splitlines()
    assert "train tuned: mlflow fails (" in line
    assert len(in_tensorboard(stage)["train/loss"]) == 4


@pytest.mark.parametrize(("peak", "share"), [(1000.0, 0.2), (None, None)])
def test_a_step_has_its_share_of_the_peak_on_a_known_card(
    stage: Stage, console: io.StringIO, peak: float | None, share: float | None
) -> None:
    step = {"event": "step", "step": 1, "total": 2, "tokens": 100, "seconds": 0.5, "memory": 2**30}
    messages = io.StringIO(f"{json.dumps(step)}\n{json.dumps({'event': 'done'})}\n")
    sent = Trackers(stage, "tuned", "a key", ())
    assert _follow_progress(stage, "tuned", messages, _Messages(), sent, lambda speed: peak and speed / peak)
    (event,) = read_jsonl(stage.run.roots.runs / "events.jsonl")
    assert (event["tokens_per_second"], event.get("share_of_peak")) == (200.0, share)
    assert ("200 tokens/s  20% of peak  1.0 GiB" in console.getvalue()) == (share is not None)
