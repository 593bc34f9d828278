"""Before and between the training processes: precision, plan and refusal by what the cards have, on a recorded box."""

import importlib.util
import io
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import DoesNotFitError, InterruptedRunError
from stages.contract.events import Events
from stages.contract.part import Node
from stages.contract.recipe import Adapter, Train
from stages.contract.stage import Stage
from stages.contract.stop import StopRequest
from stages.hardware.fit import Way, plan_training
from stages.hardware.memory import Lengths
from stages.hardware.probe import probe
from stages.hardware.step import StepPlan
from stages.hardware.targets import base_dtype, load_targets
from stages.models.shape import ModelShape, UnknownShapeError
from stages.train import attempts, planning
from stages.train.attempts import _next_attempt, _wait_for_memory
from stages.train.ladder import Attempt, Ladder, MemoryRanOutError, Shortage
from stages.train.lengths import measure_lengths
from stages.train.planning import make_plan
from tests.hardware.recorded import Box, box
from tests.train.conftest import Training

__all__ = ["box"]

TARGETS = load_targets()


class Told(Stage):
    """A stage and what it said."""

    console_text: io.StringIO


@pytest.fixture
def stage(training: Training, tmp_path: Path) -> Told:
    console = io.StringIO()
    told = Told(training.run, "train", Events(tmp_path / "events.jsonl", "train", console), StopRequest(), -1, -1)
    told.console_text = console
    return told


@pytest.mark.parametrize(
    ("setting", "target", "dtype"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "v100", "float16"),
        ("auto", "a800", "bfloat16"),
        ("float16", "h100", "float16"),
        ("float32", "v100", "float32"),
        ("bfloat16", "rtx4090", "bfloat16"),
    ],
)
def test_precision_goes_by_compute_capability(setting: str, target: str, dtype: str) -> None:
    assert base_dtype(setting, TARGETS[target]) == dtype


@pytest.mark.parametrize(
    ("setting", "target", "why"),
    [
        ("bfloat16", "v100", "but v100 has 7.0 and only emulates it"),
        ("float16", "cpu", "trains in float32"),
        ("bfloat16", "cpu", "trains in float32"),
    ],
)
def test_a_precision_that_the_card_has_not_is_refused_with_the_reason(setting: str, target: str, why: str) -> None:
    with pytest.raises(DoesNotFitError, match=why):
        base_dtype(setting, TARGETS[target])


def test_a_full_card_is_refused_before_any_process_starts(training: Training, box: Box) -> None:
    box.free(*[0.4] * 8)
    began = time.monotonic()
    code, output = training(CUDA_VISIBLE_DEVICES="3", **box.variables)
    assert code == 4, output
    last = output.splitlines()[-1]
    assert "GPU 3 (NVIDIA A800-SXM4-80GB), GPU-" in last and ": has only 0.4 of 80.0 GiB free (held by" in last
    assert "), but training needs at least " in last and " GiB on each GPU;" in last
    assert "free that GPU or use another" in last
    assert not training.run.path("train", "checkpoints").exists()
    assert time.monotonic() - began < 20


def test_with_memory_enough_the_recipe_is_taken_as_it_is(
    stage: Told, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.free(*[70.0] * 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    plan = make_plan(stage, None)
    assert (plan.processes_here, plan.way.dtype, plan.way.sharding, plan.way.changes) == (2, "bfloat16", "none", ())
    decisions = {made["what"]: made["value"] for made in stage.decisions}
    assert decisions["effective batch"] == str(plan.way.step)
    assert decisions["effective batch"].startswith("4 samples a step in passes of at most ")
    assert plan.way.step.processes == 2
    assert "estimated" in decisions["memory"]
    parts = dict(stage.facts["estimate"])
    assert parts.pop("total") == sum(parts.values()) > 0


def test_little_memory_changes_the_plan_and_says_so(
    training: Training, stage: Told, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest sample decides, not max_length; the fullest card, not the first."""
    long = Training(training.lorry, (*training.overrides, "train.max_length=8192"))
    stage.run = long.run
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with monkeypatch.context() as patch:
        patch.setattr(planning, "read_lengths", lambda *_: Lengths(2048, 2048))  # as if there were long ones
        box.free(*[70] * 8)
        whole = make_plan(stage, None).way
    assert (whole.changes, whole.step) == ((), StepPlan(4, 2, 4096))
    box.free(70, (whole.estimate.total - 1) / 2**30, *[70] * 6)
    assert make_plan(stage, None).way.changes == (), "samples of some thirty tokens"
    monkeypatch.setattr(planning, "read_lengths", lambda *_: Lengths(2048, 2048))
    stage.decisions.clear()
    plan = make_plan(stage, None)
    assert plan.way.step.effective_batch == 4
    assert [made["value"] for made in stage.decisions if made["what"] == "fit"] == list(plan.way.changes)
    assert plan.way.changes


def test_four_bits_need_the_kernels(training: Training, stage: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_TARGET", "cpu")
    stage.run = Training(training.lorry, (*training.overrides, "train.load_in_4bit=true")).run
    with pytest.raises(DoesNotFitError, match="no kernels for target cpu"):
        make_plan(stage, None)


def test_lengths_are_those_of_the_samples(small_models: Path) -> None:
    settings = Train(adapters=[Adapter(name="tuned")], max_length=300)
    model = small_models / "random-llama"

    def sample(words: int, answer: int, **more: Any) -> dict[str, Any]:
        said = {"user": "word " * words, "assistant": "yes " * answer}
        messages = [{"role": role, "content": content} for role, content in said.items()]
        return {"messages": messages, **more}

    found = measure_lengths([sample(5, 1), sample(100, 7), sample(60, 20)], model, settings, model)
    assert 107 <= found.longest <= 107 + 60
    assert 20 <= found.answer <= 20 + 10
    assert found.mean is not None and 60 + 36 <= found.mean <= 67 + 36, "of 6, 107 and 80 words, and the template's"
    assert 40 < found.deviation < 50
    assert measure_lengths([sample(5000, 1)], model, settings, model).longest == 300, "what is longer is left out"
    for unknown in ([], [sample(5, 1, images=["page.png"])]):
        assert measure_lengths(unknown, model, settings, model).longest == 300


def _name_no_process(box: Box) -> None:
    """As a driver does in many containers."""
    for card in box.cards:
        card["compute_processes"].clear()
    box.save()


def test_the_next_try_waits_until_the_memory_is_back(stage: Told, box: Box) -> None:
    _name_no_process(box)
    box.free(*[70.0] * 8)
    before = probe().gpus
    box.free(*[70.0] * 7, 10.0)
    threading.Timer(1.2, lambda: box.free(*[69.9] * 8)).start()
    began = time.monotonic()
    _wait_for_memory(stage, before, ())
    assert 1.0 < time.monotonic() - began < 5
    assert "memory is free again after" in stage.console_text.getvalue()


def test_the_next_try_waits_until_the_card_no_longer_knows_the_process(stage: Told, box: Box) -> None:
    before = probe().gpus
    pid = before[4].processes[0].pid
    threading.Timer(1.2, lambda: (box.cards[4]["compute_processes"].clear(), box.save())).start()
    began = time.monotonic()
    _wait_for_memory(stage, before, (pid,))
    assert time.monotonic() - began > 1.0


def test_memory_that_another_program_has_taken_is_not_waited_for(stage: Told, box: Box) -> None:
    """Each process on the card is known, and none is ours: what is missing will not come back."""
    box.free(*[70.0] * 8)
    before = probe().gpus
    box.free(*[10.0] * 8)
    began = time.monotonic()
    _wait_for_memory(stage, before, (1,))
    assert time.monotonic() - began < 5


def test_memory_that_does_not_come_back_is_told_and_a_stop_ends_the_waiting(
    stage: Told, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    _name_no_process(box)
    box.free(*[70.0] * 8)
    before = probe().gpus
    box.free(*[10.0] * 8)
    monkeypatch.setattr(attempts, "MEMORY_PATIENCE", 0.6)
    _wait_for_memory(stage, before, ())
    assert "GPU 0 (NVIDIA A800-SXM4-80GB): 10.0 GiB free" in stage.console_text.getvalue()
    stage.stop.signal = signal.SIGTERM
    with pytest.raises(InterruptedRunError):
        _wait_for_memory(stage, before, ())


def test_several_machines_are_told_what_to_set(stage: Told, tmp_path: Path) -> None:
    settings = Train(adapters=[Adapter(name="tuned")])
    attempt = Attempt(settings, StepPlan(16, 2, 2048), 2048, 600, 30)
    error = MemoryRanOutError("", Shortage("training", 7, "asked for 1.00 GiB"))
    ladder = Ladder.read(tmp_path)
    with pytest.raises(DoesNotFitError, match="start all 2 nodes again, which resume with less: passes of at most"):
        _next_attempt(stage, "tuned", ladder, attempt, error, Node(0, 2, "node-0:29500"))
    lower = replace(attempt, step=StepPlan(16, 2, 1024))
    assert Ladder.read(tmp_path).apply_rungs(attempt) == lower, "on every node, as its folder is node 0's"
    after = _next_attempt(stage, "tuned", ladder, lower, error, None)
    assert after == replace(attempt, step=StepPlan(16, 2, 600))


def test_a_model_whose_memory_cannot_be_estimated_is_trained_as_asked(
    stage: Told, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: Path) -> None:
        raise UnknownShapeError("config.json: no 'num_attention_heads', so memory cannot be estimated; use a decoder")

    monkeypatch.setattr(planning, "read_shape", unknown)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    plan = make_plan(stage, None)
    assert (plan.way.sharding, plan.way.changes) == ("none", ())
    assert plan.way.step.effective_batch == stage.run.recipe.train.effective_batch
    assert {made["what"]: made["value"] for made in stage.decisions}["memory"] == "not estimated"
    assert "estimate" not in stage.facts
    assert "effective batch" in {made["what"] for made in stage.decisions}


def test_without_deepspeed_nothing_is_shared_out(stage: Told, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the image of v100-gptq; a plan that does not fit would else end in a library that is not there."""
    asked: list[str] = []

    def planned(shape: ModelShape, settings: Train, *others: Any) -> Way:
        asked.append(settings.sharding)
        return plan_training(shape, settings, *others)

    monkeypatch.setattr(planning, "plan_training", planned)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    box.free(*[70.0] * 8)
    for there in (None, object()):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, there=there: there)
        make_plan(stage, None)
    assert asked == ["none", "auto"]
