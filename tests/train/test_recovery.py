"""Real training that runs out of memory: the error is torch's own, raised where a small card would raise it."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from stages.contract.files import read_json, read_jsonl
from stages.train.checkpoints import newest_complete_checkpoint
from tests.conftest import Lorry
from tests.small_inputs import RANDOM_LLAMA
from tests.train.conftest import Training
from tests.train.test_nodes import ended, free_port, processes_naming

OVERRIDES = (
    *RANDOM_LLAMA,
    *("train.effective_batch=4", "train.checkpoint_every=2", "train.log_every=1"),
    "train.epochs=1",  # six steps
)
STEPS = [1, 2, 3, 4, 5, 6]
SHORTER = r"passes of at most \d+ tokens, still 4 samples a step"
"""A rung that shortens passes."""


def make(folder: Path, models: Path, *overrides: str) -> Training:
    folder.mkdir(exist_ok=True)
    return Training(Lorry(folder, models, folder), (*OVERRIDES, *overrides)).with_samples()


def hungry(training: Training, **hunger: Any) -> tuple[int, str]:
    return training(HUNGER=json.dumps(hunger))


def rungs(training: Training) -> list[str]:
    return [made["value"] for made in training.manifest()["decisions"] if made["what"] == "out of memory"]


def metrics(training: Training, what: str) -> dict[int, float]:
    """A loss by step; each step may stand there once."""
    rows = [row for row in read_jsonl(training.run.path("train", "metrics.jsonl")) if what in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row[what] for row in rows}


def adapter(training: Training) -> Path:
    return training.run.path("train", "adapters", "tuned")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, small_models: Path) -> Training:
    """The same training with memory enough."""
    training = make(tmp_path_factory.mktemp("calm"), small_models)
    code, output = training()
    assert code == 0, output
    return training


@pytest.mark.long
def test_training_goes_on_with_half_the_tokens_of_a_pass_and_the_loss_joins(
    calm: Training, tmp_path: Path, small_models: Path
) -> None:
    training = make(tmp_path / "hungry", small_models)
    code, output = hungry(training, during="training", above=1, from_step=3)
    assert code == 0, output
    assert rungs(training) and all(re.fullmatch(SHORTER, rung) for rung in rungs(training))
    assert f"out of memory: {rungs(training)[0]}" in output and "resuming from checkpoint-2" in output
    losses, undisturbed = metrics(training, "loss"), metrics(calm, "loss")
    assert list(losses) == list(undisturbed) == STEPS
    assert {step: losses[step] for step in (1, 2)} == {step: undisturbed[step] for step in (1, 2)}
    # shorter passes sum in another order; samples and dropout masks are the same
    assert losses == pytest.approx(undisturbed, abs=0.05)
    made, wanted = (read_json(adapter(one) / "training.json") for one in (training, calm))
    assert made["tokens"] == wanted["tokens"] > 24 * 10, "every sample was used as often, padding not counted"
    assert not processes_naming(training.run.folder)


@pytest.mark.long
def test_an_evaluation_out_of_memory_leaves_training_untouched(
    calm: Training, tmp_path: Path, small_models: Path
) -> None:
    training = make(tmp_path / "hungry", small_models).with_samples(validation=6)
    code, output = hungry(training, during="evaluation", above=2, from_step=4)
    assert code == 0, output
    unchanged = r"evaluation in passes of at most \d+ tokens; training unchanged"
    assert rungs(training) and all(re.fullmatch(unchanged, rung) for rung in rungs(training))
    assert "resuming from checkpoint-4" in output, "the checkpoint of a step is saved before its evaluation"
    assert metrics(training, "loss") == metrics(calm, "loss")
    assert list(metrics(training, "eval_loss")) == list(metrics(calm, "eval_loss")) == [2, 4, 6]
    weights = [(adapter(one) / "adapter_model.safetensors").read_bytes() for one in (training, calm)]
    assert weights[0] == weights[1]


@pytest.mark.kill
def test_below_the_last_rung_it_ends_in_one_line(tmp_path: Path, small_models: Path) -> None:
    training = make(tmp_path / "hungry", small_models)
    code, output = hungry(training, during="training", above=0)
    assert code == 4, output
    assert "out of memory: 2 of 2 layers checkpointed, still 4 samples a step" in output
    last = output.splitlines()[-1]
    assert "nothing is left to reduce" in last and "train.load_in_4bit=true" in last
    assert "asked for 2.00 GiB, 1.94 MiB of 23.65 GiB free" in last
    assert not processes_naming(training.run.folder)
    assert not adapter(training).exists()


@pytest.mark.kill
def test_a_model_that_does_not_load_ends_at_once_in_one_line(tmp_path: Path, small_models: Path) -> None:
    training = make(tmp_path / "hungry", small_models)
    code, output = hungry(training, during="loading", above=0)
    assert code == 4, output
    assert "out of memory while loading the model (asked for 2.00 GiB" in output.splitlines()[-1]
    assert output.count("out of memory") == 1, "no rung was tried"


@pytest.mark.kill
def test_an_evaluation_that_never_fits_is_given_up_and_training_ends_well(
    calm: Training, tmp_path: Path, small_models: Path
) -> None:
    training = make(tmp_path / "hungry", small_models)
    code, output = hungry(training, during="evaluation", above=0)
    assert code == 0, output
    assert rungs(training)[-1] == "no evaluation; training unchanged"
    assert metrics(training, "loss") == metrics(calm, "loss")
    assert not metrics(training, "eval_loss")


@pytest.mark.kill
def test_checkpointing_and_a_shorter_length_where_the_recipe_allows_it(tmp_path: Path, small_models: Path) -> None:
    training = make(tmp_path / "hungry", small_models, "train.max_length=256", "train.least_max_length=29")
    code, output = hungry(training, during="training", above=0, unless_checkpointing=True)
    assert code == 0, output
    assert rungs(training)[-1] == "1 of 2 layers checkpointed, still 4 samples a step"
    assert all(re.fullmatch(SHORTER, rung) for rung in rungs(training)[:-1])
    assert list(metrics(training, "loss")) == STEPS

    shorter = make(
        tmp_path / "shorter",
        small_models,
        "train.gradient_checkpointing=true",
        *("train.max_length=32", "train.least_max_length=29"),
    )
    code, output = hungry(shorter, during="training", longer=29, above=0)
    assert code == 0, output
    assert rungs(shorter)[-1] == "max_length 29: longer samples are skipped"
    manifest = shorter.manifest()
    left_out = [entry for entry in manifest["skipped"] if entry["detail"] == "train, adapter tuned"]
    assert {entry["reason"] for entry in left_out} == {
        "longer than train.max_length, which was lowered to 29 to fit the memory"
    }
    assert manifest["counts"]["tuned samples"] + len(left_out) == 24


@pytest.mark.kill
def test_of_several_machines_the_hungry_one_says_what_to_set(tmp_path: Path, small_models: Path) -> None:
    training = make(tmp_path / "hungry", small_models)
    meeting = {"LORRY_NODES": "2", "LORRY_RENDEZVOUS": f"127.0.0.1:{free_port()}", "OMP_NUM_THREADS": "1"}
    hunger = json.dumps({"during": "training", "above": 1, "from_step": 1})
    first = training.start(**meeting, LORRY_NODE_RANK="0")
    second = training.start(**meeting, LORRY_NODE_RANK="1", HUNGER=hunger)
    codes, output = ended([first, second])
    assert codes == [75, 4], output
    assert "start all 2 nodes again, which resume with less: passes of at most " in output
    assert ": the other processes are gone (" in output
    assert not processes_naming(training.run.folder)


@pytest.mark.kill
def test_a_kill_does_not_forget_the_rung(tmp_path: Path, small_models: Path) -> None:
    training = make(tmp_path / "hungry", small_models, "train.epochs=8")
    hunger = json.dumps({"during": "training", "above": 2, "from_step": 3})
    process = training.start(HUNGER=hunger)
    work = training.run.path("train", "checkpoints", "tuned")
    deadline = time.monotonic() + 120
    while not (work / "ladder.json").is_file() or not (work / "checkpoint-8" / "complete.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not training.run.path("train", "manifest.json").exists()

    code, output = hungry(training, during="training", above=2, from_step=3)
    assert code == 0, output
    assert f"an earlier start ran out of memory; its change was {rungs(training)[0]}" in output
    assert rungs(training) and all(re.fullmatch(SHORTER, rung) for rung in rungs(training))
    assert list(metrics(training, "loss")) == list(range(1, 49))
    assert load_file(adapter(training) / "adapter_model.safetensors")


def wait_until(process: "subprocess.Popen[str]", happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.kill
def test_ctrl_c_while_the_model_loads_saves_nothing_and_a_second_one_keeps_the_last_checkpoint(
    tmp_path: Path, small_models: Path
) -> None:
    training = make(tmp_path / "t", small_models, "train.epochs=20")
    checkpoints = training.run.path("train", "checkpoints", "tuned")
    process = training.start()
    wait_until(process, (checkpoints / "samples" / "key.json").is_file)  # written just before the model loads
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    output, _ = process.communicate(timeout=100)
    assert (process.returncode, "24 samples" in output) == (75, False), output
    assert output.splitlines()[-1] == "train: training tuned: stopped by SIGINT; run the same command again"

    assert list(checkpoints.glob("checkpoint-*")) == []
    process = training.start()
    wait_until(process, (checkpoints / "checkpoint-2" / "complete.json").is_file)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout is not None
    assert any("then stops (SIGINT); press Ctrl-C again to stop at once\n" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert output.splitlines()[-1] == (
        "train: stopped by SIGINT after saving finished work; run the same command again"
    )
    assert newest_complete_checkpoint(checkpoints) is not None


@pytest.mark.kill
@pytest.mark.parametrize("validation", [2, 0])
def test_a_kill_before_a_checkpoint_is_marked_leaves_the_one_before_though_only_one_is_kept(
    calm: Training, tmp_path: Path, small_models: Path, validation: int
) -> None:
    training = make(tmp_path / "t", small_models, "train.keep_checkpoints=1").with_samples(validation=validation)
    checkpoints = training.run.path("train", "checkpoints", "tuned")
    code, output = hungry(training, during="saving", from_step=6)
    assert (code, ": ended by SIGKILL (" in output) == (1, True), output
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    newest = newest_complete_checkpoint(checkpoints)
    assert newest is not None and newest.name == "checkpoint-4"
    code, output = training()
    assert (code, "resuming from checkpoint-4" in output) == (0, True), output
    assert metrics(training, "loss") == metrics(calm, "loss")
    assert metrics(training, "eval_loss") == (metrics(calm, "eval_loss") if validation else {})


@pytest.mark.kill
def test_a_kill_while_samples_are_encoded_leaves_no_process(tmp_path: Path, small_models: Path) -> None:
    """Several processes encode them, and would wait for work that nobody will give them any more."""
    training = make(tmp_path / "t", small_models).with_samples(5000)
    process = training.start()
    wait_until(process, lambda: len(processes_naming(training.run.folder)) > 1)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while processes_naming(training.run.folder):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not list(training.run.path("train", "checkpoints", "tuned").glob("checkpoint-*"))
