"""Checkpoints: going on from one is as if nothing had been."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.contract.files import read_json
from stages.train.checkpoints import optimizer_state
from stages.train.loop import make_optimizer
from stages.train.together import Together
from tests.conftest import snapshot
from tests.train.conftest import Training
from tests.train.sharded_training import make_inputs, train
from tests.train.test_trackers import tensorboard_rows


@pytest.mark.long
def test_going_on_is_the_same_to_the_bit(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    for training in ("llama/whole", "llama/resumed/whole"):
        train(tmp_path, training, Together(1, use_cpu=True), 1)
    whole, resumed = (snapshot(tmp_path / "llama" / name / "checkpoint-6") for name in ("whole", "resumed"))
    assert whole == resumed
    assert [entry["step"] for entry in read_json(tmp_path / "llama" / "resumed.json")][-2:] == [6, 6]


def test_weights_that_were_never_trained_have_no_state() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    trainee: Any = SimpleNamespace(weights={"lora_A.weight": weight}, device=weight.device)
    settings = SimpleNamespace(lora_plus_ratio=None, weight_decay=0.0, adam_beta2=0.999)
    optimizer = make_optimizer(trainee, 1e-3, settings)
    assert optimizer_state(trainee, optimizer) == {}
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    names = {"lora_A.weight.exp_avg", "lora_A.weight.exp_avg_sq", "lora_A.weight.step"}
    assert optimizer_state(trainee, optimizer).keys() == names


@pytest.mark.kill
@pytest.mark.usefixtures("hang_up")
def test_a_stopped_training_with_lora_plus_ends_in_the_bytes_of_an_undisturbed_one(
    training: Training, tmp_path: Path
) -> None:
    overrides = (*training.overrides, "train.lora_plus_ratio=8", "train.dropout=0.1", "train.epochs=8")
    stopped = Training(training.lorry, overrides)
    process = stopped.start()
    events = stopped.run.path("train", "events.jsonl")
    deadline = time.monotonic() + 120
    while not events.is_file() or events.read_text().count('"loss"') < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGHUP)  # as a lost SSH connection does
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert "train: saves a checkpoint after this step, then stops (SIGHUP)\n" in output
    (checkpoint,) = stopped.run.path("train", "checkpoints", "tuned").glob("checkpoint-*")
    assert 3 <= int(checkpoint.name.rpartition("-")[2]) < 48
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "complete.json", "optimizer.safetensors", "state.json")
    ]
    code, output = stopped()
    assert code == 0, output
    assert f"resuming from {checkpoint.name}" in output

    whole = Training(replace(training.lorry, runs=tmp_path / "whole"), overrides).with_samples()
    code, output = whole()
    assert code == 0, output
    mine, theirs = (snapshot(each.run.path("train", "adapters", "tuned")) for each in (stopped, whole))
    assert mine.pop("timing.json") != theirs.pop("timing.json")
    assert mine == theirs
    shown, others = (tensorboard_rows(each.run.path("train", "tensorboard", "tuned")) for each in (stopped, whole))
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "validation/loss"):
        assert shown[name] == others[name] and shown[name], name
