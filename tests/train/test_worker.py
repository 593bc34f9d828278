"""Checkpoints: which one a restart takes; and what swift is told."""

import os
import signal
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from stages.contract.files import read_json, write_json
from stages.contract.part import Node
from stages.contract.recipe import Adapter, load_recipe
from stages.models.chat_settings import ChatSettings
from stages.train.job import Job, Progress, file_sizes
from stages.train.ladder import LostCardError
from stages.train.torchrun import _json_value, _Messages, _Workers, torchrun_command
from stages.train.worker import (
    _arguments,
    _explained_error,
    _let_memory_segments_grow,
    _publish_weights,
    largest_figures,
    newest_complete_checkpoint,
    pad_samples,
)
from tests.conftest import REPOSITORY


def checkpoint(work: Path, step: int, whole: bool = True) -> Path:
    folder = work / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
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
        micro_batch=2,
        accumulation=5,
        processes=processes,
        sharding="none",
        eval_micro_batch=3,
        evaluate=True,
        use_cpu=True,
        cards=[],
        model_settings=recipe.model,
        settings=recipe.train,
        progress=0,
    )


def told(tmp_path: Path, *overrides: str, processes: int = 1) -> dict[str, list[str]]:
    """What swift is told, by option."""
    options: dict[str, list[str]] = {}
    for argument in _arguments(job(tmp_path, *overrides, processes=processes), tmp_path, None):
        if argument.startswith("--"):
            options[argument] = []
        else:
            options[list(options)[-1]].append(argument)
    return options


def test_swift_is_told_batch_precision_and_seed(tmp_path: Path) -> None:
    options = told(tmp_path)
    assert options["--torch_dtype"] == ["float16"]
    assert options["--lora_dtype"] == ["float32"]  # on a V100 the cure for 'Attempting to unscale FP16 gradients'
    assert options["--per_device_train_batch_size"] == ["2"]
    assert options["--gradient_accumulation_steps"] == ["5"]
    assert options["--seed"] == options["--data_seed"] == ["7"]
    assert options["--split_dataset_ratio"] == ["0"]  # a split by rows would leak documents
    assert "--resume_from_checkpoint" not in options


def test_swift_is_told_of_a_template_only_for_samples_with_pictures(tmp_path: Path) -> None:
    assert told(tmp_path)["--template"] == ["chatml"] and "--enable_thinking" not in told(tmp_path)
    assert told(tmp_path, "model.swift_template=null")["--template"] == ["dummy"]


def test_the_recipe_s_chat_template_is_saved_with_the_adapter(tmp_path: Path) -> None:
    trained = replace(job(tmp_path), chat=ChatSettings("{{ messages }}", enable_thinking=False))
    last = checkpoint(trained.work, 3, whole=False)
    write_json(last / "adapter_config.json", {"target_modules": ["b", "a"], "r": 8, "lora_alpha": 32})
    write_json(last / "trainer_state.json", {"global_step": 3})
    write_json(last / "complete.json", {"sizes": file_sizes(last)})
    _publish_weights(trained, [], {})
    assert (trained.adapter / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "chat_template.jinja" in read_json(trained.adapter / "made.json")["files"]
    write_json(tmp_path / "job.json", _json_value(asdict(trained)))
    assert Job.read(tmp_path / "job.json").chat == trained.chat


def test_target_modules_are_names_or_one_regular_expression(tmp_path: Path) -> None:
    names = told(tmp_path, "train.target_modules=[q_proj, v_proj]")
    assert names["--target_modules"] == ["q_proj", "v_proj"]
    pattern = told(tmp_path, r"train.target_modules='.*\.[12]\..*_proj'")
    assert pattern["--target_regex"] == [r".*\.[12]\..*_proj"]
    assert "--target_modules" not in pattern


def test_several_processes_are_told_how_to_talk(tmp_path: Path) -> None:
    assert "--ddp_backend" not in told(tmp_path)
    assert told(tmp_path, processes=2)["--ddp_backend"] == ["gloo"]


def test_memory_decides_batches_of_evaluation_pixels_and_bits(tmp_path: Path) -> None:
    plain = told(tmp_path)
    assert plain["--per_device_eval_batch_size"] == ["3"]
    assert plain["--fp16"] == ["True"] and plain["--bf16"] == ["False"]
    assert plain["--vit_gradient_checkpointing"] == ["False"]
    assert not {"--max_pixels", "--quant_method"} & set(plain)
    lean = told(tmp_path, "train.max_pixels=50176", "train.load_in_4bit=true")
    assert lean["--max_pixels"] == ["50176"]
    assert (lean["--quant_method"], lean["--quant_bits"], lean["--bnb_4bit_quant_type"]) == (["bnb"], ["4"], ["nf4"])
    assert lean["--bnb_4bit_compute_dtype"] == ["float16"]


def test_under_zero3_checkpointing_is_not_the_reentrant_kind(tmp_path: Path) -> None:
    """ms-swift's choice under DeepSpeed, with which a 14B model took 53 GB of each of two cards for 26 expected."""
    assert not {"--gradient_checkpointing_kwargs", "--deepspeed"} & set(told(tmp_path))
    sharded = _arguments(replace(job(tmp_path), sharding="zero3"), tmp_path, None)
    assert sharded[sharded.index("--gradient_checkpointing_kwargs") + 1] == '{"use_reentrant": false}'


def test_a_lost_card_is_named_with_cuda_s_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = replace(job(tmp_path), processes=2, cards=["GPU 3 (A800), GPU-a", "GPU 5 (A800), GPU-b"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    progress = Progress(os.open(os.devnull, os.O_WRONLY))
    progress.during, progress.step = "training", 12
    error = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")
    explained, shortage = _explained_error(lost, error, progress)
    assert isinstance(explained, LostCardError) and shortage is None
    assert explained.exit_code == 75, "what is saved can be gone on with"
    assert str(explained).startswith(
        "GPU 5 (A800), GPU-b: stopped working after step 12 (CUDA error: unspecified launch failure); run the same"
        " command again to resume from the last checkpoint"
    )
    assert _explained_error(lost, RuntimeError("CUDA error: device-side assert triggered"), progress) == (None, None)


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
    alone = torchrun_command(tmp_path / "job.json", 4, None)
    assert alone[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=4"),
        *("-m", "stages.train.worker", str(tmp_path / "job.json")),
    ]
    second = torchrun_command(tmp_path / "job.json", 8, Node(1, 2, "node-0.train:29500"))
    where = ("--nnodes=2", "--node-rank=1", "--master-addr=node-0.train", "--master-port=29500", "--nproc-per-node=8")
    assert set(where) < set(second)


@pytest.mark.parametrize(
    ("samples", "processes", "shared"),
    [("abc", 1, "abc"), ("abcd", 2, "abcd"), ("abc", 2, "abca"), ("ab", 5, "ababa"), ("", 4, "")],
)
def test_each_process_gets_as_many_samples_and_none_is_left_out(samples: str, processes: int, shared: str) -> None:
    assert pad_samples(list(samples), processes) == list(shared)
