"""The optimizer's state by the weights' names: going on from it is as if nothing had been."""

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.contract.files import read_json
from stages.train.optimizer_state import TorchStates, name_in_file, read_schedule, write_schedule
from stages.train.worker import has_random_states
from tests.conftest import snapshot
from tests.train.conftest import Training

LORA = peft.LoraConfig(target_modules=["0", "1"], r=2)


class Small:
    """A model with LoRA on both layers, and an optimizer with the groups of LoRA+."""

    def __init__(self, fused: bool = False, ratio: float = 4) -> None:
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        self.model: Any = peft.get_peft_model(layers, LORA)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trained.items() if "lora_A" in name], "weight_decay": 0.1},
            {"params": [p for name, p in trained.items() if "lora_B" in name], "lr": 0.01 * ratio},
        ]
        self.names = {p: name_in_file(name) for name, p in trained.items()}
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, fused=fused)
        self.states = TorchStates(self.optimizer, self.names)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: math.cos(step / 7))

    def train(self, steps: range) -> "Small":
        for step in steps:
            torch.manual_seed(step)
            self.model(torch.randn(4, 3)).square().sum().backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return self

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for parameter, name in self.names.items()}


@pytest.mark.parametrize("fused", [False, True])
def test_going_on_is_the_same_to_the_bit(tmp_path: Path, fused: bool) -> None:
    whole = Small(fused).train(range(6)).weights()
    half = Small(fused).train(range(3))
    save_file(half.states.read(), tmp_path / "states")
    rest = Small(fused)
    with torch.no_grad():
        for parameter, name in rest.names.items():
            parameter.copy_(half.weights()[name])
    rest.states.write(load_file(tmp_path / "states"))
    write_schedule(rest.schedule, read_schedule(half.schedule))
    assert [group["lr"] for group in rest.optimizer.param_groups] == half.schedule.get_last_lr()
    resumed = rest.train(range(3, 6)).weights()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert rest.schedule.state_dict() == Small(fused).train(range(6)).schedule.state_dict()


def test_weights_that_were_never_trained_have_no_state() -> None:
    small = Small()
    assert small.states.read() == {}
    small.states.write({})
    assert not small.optimizer.state


def test_the_names_are_those_of_the_adapter_file(tmp_path: Path) -> None:
    small = Small().train(range(1))
    small.model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == set(small.names.values())
    assert {name.rpartition(".")[0] for name in small.states.read()} == set(small.names.values())
    assert name_in_file("model.embed_tokens.lora_embedding_A.default") == "model.embed_tokens.lora_embedding_A"


def test_other_learning_rates_are_refused() -> None:
    """ms-swift forgets LoRA+ when it goes on without additional_config.json, and says nothing."""
    with pytest.raises(ValueError, match=r"are \[0.01, 0.04\], but \[0.01, 0.01\] are set"):
        write_schedule(Small(ratio=1).schedule, read_schedule(Small().schedule))


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
        *("adapter_config.json", "adapter_model.safetensors", "additional_config.json", "complete.json"),
        *("optimizer.json", "optimizer.safetensors", "rng_state.pth", "trainer_state.json"),
    ]
    rates = read_json(checkpoint / "optimizer.json")["schedule"]["learning_rates"]
    assert rates == pytest.approx([1e-3, 8e-3])
    code, output = stopped()
    assert code == 0, output
    assert f"resuming from {checkpoint.name}" in output

    whole = Training(replace(training.lorry, runs=tmp_path / "whole"), overrides).with_samples()
    code, output = whole()
    assert code == 0, output
    mine, theirs = (snapshot(each.run.path("train", "adapters", "tuned")) for each in (stopped, whole))
    assert mine.pop("timing.json") != theirs.pop("timing.json")
    assert mine == theirs


def test_random_states_fit_only_as_many_processes_as_saved_them(tmp_path: Path) -> None:
    (tmp_path / "rng_state.pth").touch()
    assert has_random_states(tmp_path, 1) and not has_random_states(tmp_path, 2)
    (tmp_path / "rng_state.pth").unlink()
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    assert [has_random_states(tmp_path, processes) for processes in (1, 2, 3)] == [False, True, False]
