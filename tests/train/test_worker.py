"""The training process: which checkpoint a restart takes, which jobs it does, what it says of an error."""

import os
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stages.contract.errors import InterruptedRunError, UsageError
from stages.contract.files import read_json, remove, write_json
from stages.contract.part import Node
from stages.contract.recipe import Adapter, load_recipe
from stages.contract.stop import StopRequest
from stages.models.chat_settings import ChatSettings
from stages.train import checkpoints
from stages.train.checkpoints import Checkpoints, State, checkpoints_of_earlier_versions, newest_complete_checkpoint
from stages.train.job import Job, Progress
from stages.train.ladder import LostCardError
from stages.train.together import Together
from stages.train.torchrun import _Messages, _Workers, torchrun_command
from stages.train.worker import (
    _explained_error,
    _jobs,
    _let_memory_segments_grow,
    _publish_weights,
    _refuse_different_job,
    largest_figures,
)
from tests.conftest import REPOSITORY, snapshot


def checkpoint(work: Path, step: int, whole: bool = True, earlier: bool = False) -> Path:
    """Write a checkpoint, complete or not, of this version or of an earlier one."""
    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    own = "trainer_state.json" if earlier else "state.json"
    for name in ("adapter_model.safetensors", "optimizer.safetensors", own):
        (folder / name).write_bytes(b"x" * step)
    if whole:
        write_json(folder / "complete.json", {"sizes": {p.name: step for p in folder.iterdir()}})
    return folder


def test_the_newest_whole_checkpoint_is_taken_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_a_checkpoint_without_its_mark_is_deleted(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    torn = checkpoint(tmp_path, 20, whole=False)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not torn.exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_with_a_cut_or_lost_file_is_deleted(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path, 10)
    for step, harm in ((20, lambda path: path.write_bytes(b"x")), (30, lambda path: path.unlink())):
        harm(checkpoint(tmp_path, step) / name)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_complete_checkpoint(tmp_path) is None


class Tiny(torch.nn.Module):
    """Stands for a trainee with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"w": torch.nn.Parameter(torch.ones(2))}

    def save(self, folder: Path) -> None:
        save_file({"w": self.weights["w"].detach()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("step", [10, 20, 30])
def test_a_checkpoint_of_an_earlier_version_stays_until_the_first_new_one_is_complete(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = job(tmp_path, "train.keep_checkpoints=2")
    for old in (10, 20):
        checkpoint(training.work, old, earlier=True)
    assert newest_complete_checkpoint(training.work) is None
    before = snapshot(training.work)
    assert [path.name for path in checkpoints_of_earlier_versions(training.work)] == ["checkpoint-10", "checkpoint-20"]

    trainee: Any = Tiny()
    optimizer = torch.optim.AdamW(trainee.weights.values())
    saves = Checkpoints(training, Together(1, use_cpu=True))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "file_sizes", lambda _: 1 / 0)  # a kill before the new one is marked
        with pytest.raises(ZeroDivisionError):
            saves.save(State(step), trainee, optimizer)
    assert newest_complete_checkpoint(training.work) is None
    kept = {name.removeprefix("earlier-"): content for name, content in snapshot(training.work).items()}
    assert kept == before
    assert len(checkpoints_of_earlier_versions(training.work)) == 2

    saves.save(State(step), trainee, optimizer)
    assert [path.name for path in training.work.iterdir()] == [f"checkpoint-{step}"]
    assert newest_complete_checkpoint(training.work) == training.work / f"checkpoint-{step}"


def job(tmp_path: Path, *overrides: str, processes: int = 1) -> Job:
    recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny", overrides)
    return Job(
        model=tmp_path / "model",
        work=tmp_path / "work",
        scratch=tmp_path / "scratch",
        adapter=tmp_path / "adapter",
        run=tmp_path,
        key="",
        mix=Adapter(name="tuned"),
        train=[],
        validation=[],
        seed=7,
        dtype="float16",
        pass_tokens=100,
        processes=processes,
        sharding="none",
        evaluation_tokens=100,
        evaluate=True,
        use_cpu=True,
        cards=[],
        model_settings=recipe.model,
        settings=recipe.train,
        progress=0,
    )


def test_the_recipe_s_chat_template_is_saved_with_the_adapter(tmp_path: Path) -> None:
    trained = replace(job(tmp_path), chat=ChatSettings("{{ messages }}", enable_thinking=False))
    last = checkpoint(trained.work, 3, whole=False)
    write_json(last / "adapter_config.json", {"target_modules": ["b", "a"], "r": 8, "lora_alpha": 32})
    _publish_weights(trained, 3, [], None, {})
    assert (trained.adapter / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "chat_template.jinja" in read_json(trained.adapter / "made.json")["files"]


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = replace(job(tmp_path), chat=ChatSettings("{{ messages }}", enable_thinking=False))
    for one in (written, replace(written, connector=(tmp_path / "connector", "abc"))):
        one.write(tmp_path / "job.json")
        assert Job.read(tmp_path / "job.json") == one


def test_jobs_are_those_that_come_until_the_folder_is_removed(tmp_path: Path) -> None:
    first, second = (replace(job(tmp_path), key=key) for key in ("first", "second"))
    folder, stop = tmp_path / "jobs", StopRequest()
    first.write(folder / "1.json")
    jobs = _jobs(folder, stop)
    assert next(jobs) == first
    threading.Timer(0.1, lambda: second.write(folder / "2.json")).start()
    assert next(jobs) == second
    threading.Timer(0.1, lambda: remove(folder)).start()
    assert list(jobs) == []
    second.write(tmp_path / "job.json")
    assert list(_jobs(tmp_path / "job.json", stop)) == [second]


def test_a_stop_ends_the_waiting_for_a_job(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        next(_jobs(tmp_path, stop))


def test_a_base_is_kept_only_for_the_same_base(tmp_path: Path) -> None:
    one = job(tmp_path)
    others = {
        "model": tmp_path / "other",
        "dtype": "bfloat16",
        "connector": (tmp_path / "connector", "abc"),
        "processes": 2,
        "settings": one.settings.model_copy(update={"load_in_4bit": True}),
    }
    assert all(replace(one, **{name: value}).base != one.base for name, value in others.items())
    same = {"mix": Adapter(name="other"), "seed": 8, "pass_tokens": 7, "checkpointed_layers": 1}
    same |= {"settings": one.settings.model_copy(update={"rank": 3, "dropout": 0.5})}
    assert all(replace(one, **{name: value}).base == one.base for name, value in same.items())
    assert replace(one, sharding="zero3", processes=2).base is None


def test_processes_with_other_checkpointed_layers_do_not_train_together(tmp_path: Path) -> None:
    class Two(Together):
        def first_value(self, value: Any) -> Any:
            return value if isinstance(value, str) else {**value, "checkpointed layers": 3}

    with pytest.raises(UsageError, match=r"'checkpointed layers': 0.*node 0 has.*'checkpointed layers': 3"):
        _refuse_different_job(job(tmp_path), Two(1, use_cpu=True))


def test_a_lost_card_is_named_with_cuda_s_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = replace(job(tmp_path), processes=2, cards=["GPU 3 (A800), GPU-a", "GPU 5 (A800), GPU-b"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    progress = Progress(os.open(os.devnull, os.O_WRONLY))
    progress.during, progress.step = "training", 12
    error = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")
    explained, shortage = _explained_error(lost, error, progress, StopRequest())
    assert isinstance(explained, LostCardError) and shortage is None
    assert explained.exit_code == 75, "what is saved can be gone on with"
    assert str(explained).startswith(
        "GPU 5 (A800), GPU-b: stopped working after step 12 (CUDA error: unspecified launch failure); run the same"
        " command again to resume from the last checkpoint"
    )
    bug = RuntimeError("CUDA error: device-side assert triggered")
    assert _explained_error(lost, bug, progress, StopRequest()) == (None, None)


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_segments_grow_unless_a_person_set_it_otherwise(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:64")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    _let_memory_segments_grow()
    expected = {own: "max_split_size_mb:64"} if own else dict.fromkeys(names, "expandable_segments:True")
    assert {name: os.environ[name] for name in names if name in os.environ} == expected


def test_of_several_processes_the_largest_memory_counts() -> None:
    assert largest_figures([{"reserved": 3, "allocated": 2}, {"reserved": 2, "allocated": 5}]) == {
        "reserved": 3,
        "allocated": 5,
    }


@pytest.mark.parametrize("steps", [0, 1])
def test_processes_that_still_load_are_ended_and_others_save_first(steps: int) -> None:
    launcher, process = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    try:
        workers = _Workers(launcher, _Messages(processes=[process.pid], steps=steps), None)
        workers.send_signal(signal.SIGTERM)
        ended, other, number = (process, launcher, -signal.SIGTERM) if steps else (launcher, process, -signal.SIGKILL)
        assert ended.wait(timeout=10) == number and other.poll() is None
    finally:
        for one in (launcher, process):
            one.kill()
            one.wait()


def test_one_machine_needs_no_meeting_and_nodes_keep_their_ranks(tmp_path: Path) -> None:
    alone = torchrun_command(tmp_path, 4, None)
    assert alone[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=4"),
        *("-m", "stages.train.worker", str(tmp_path)),
    ]
    second = torchrun_command(tmp_path, 8, Node(1, 2, "node-0.train:29500"))
    where = ("--nnodes=2", "--node-rank=1", "--master-addr=node-0.train", "--master-port=29500", "--nproc-per-node=8")
    assert set(where) < set(second)
