"""The training process with jobs of its own: a tiny random model, packs, a resume, five processes.

`test_v100_wheels.py` runs this file also with the wheels of the image v100-gptq, so it uses no fixture of conftest.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stages.contract.files import read_json, remove, write_json, write_jsonl
from stages.contract.recipe import load_recipe
from stages.train.packing import Steps
from stages.train.samples import Samples

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SEED = 3


def write_model(folder: Path, **sizes: int) -> None:
    """Write a random model of some thousand weights, whose tokens are bytes. `sizes` go into its config."""
    words = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    small = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Qwen2Config(**{**small, **sizes}, num_attention_heads=4, num_key_value_heads=2, eos_token_id=1)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def write_samples(path: Path, number: int) -> None:
    """Samples of different lengths, whose answers can be learnt."""
    turns = [[f"What is {'x' * (7 * i % 40)}{i}?", f"It is {'y' * (5 * i % 23)}."] for i in range(number)]
    rows = [
        {
            "id": str(i),
            "messages": [
                {"role": role, "content": said} for role, said in zip(("user", "assistant"), turn, strict=True)
            ],
            "meta": {"source": "questions"},
        }
        for i, turn in enumerate(turns)
    ]
    write_jsonl(path, rows)


def write_job(folder: Path, name: str, samples: int, *overrides: str, **changes: Any) -> Path:
    """Write the job of one adapter, with the model and the samples in `folder`. Returns its file."""
    write_samples(folder / f"{samples}.jsonl", samples)
    recipe = load_recipe(
        REPOSITORY / "recipes" / "patent-qa.yaml", "tiny", ("train.target_modules=[all-linear]", *overrides)
    )
    own = folder / name
    job = {
        **{"model": folder / "model", "work": own / "work", "scratch": own / "scratch", "adapter": own / "adapter"},
        **{
            "run": folder,
            "key": "",
            "mix": {"name": "tuned"},
            "train": [folder / f"{samples}.jsonl"],
            "validation": [],
        },
        **{"seed": SEED, "dtype": "float32", "sharding": "none", "pass_tokens": 2000, "processes": 1},
        **{"evaluation_tokens": 2000, "evaluate": False, "use_cpu": True, "cards": [], "progress": 1},
        **{"model_settings": recipe.model.model_dump(), "settings": recipe.train.model_dump(), "chat": {}},
        **{"connector": None, **changes},
    }
    write_json(own / "job.json", json.loads(json.dumps(job, default=str)))
    return own / "job.json"


def command_of(jobs: Path, processes: int) -> list[str]:
    """The command that does a job, or the jobs in a folder."""
    torchrun = (
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={processes}",
        "-m",
    )
    return [sys.executable, "-m", *(torchrun if processes > 1 else ()), "stages.train.worker", str(jobs)]


def run_job(job: Path, processes: int = 1) -> list[dict[str, Any]]:
    """Run a job to its end. Returns the messages of its first process."""
    command = command_of(job, processes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "GPT-QModel" not in done.stdout + done.stderr, "PEFT imported gptqmodel, which sets environment variables"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"event"')]


def weights_of(job: Path) -> dict[str, torch.Tensor]:
    """The adapter that a job trained."""
    return load_file(job.parent / "adapter" / "adapter_model.safetensors")  # type: ignore[no-any-return]


def log_of(job: Path) -> list[dict[str, Any]]:
    """A job's log entries."""
    log: list[dict[str, Any]] = read_json(job.parent / "adapter" / "training.json")["log"]
    return log


@pytest.mark.long
def test_packs_train_as_one_at_a_time_and_a_resume_ends_in_the_same_bytes(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    settings = ("train.effective_batch=8", "train.epochs=2", "train.checkpoint_every=2", "train.dropout=0.1")
    packed, alone = (
        write_job(tmp_path, name, 20, *settings, pass_tokens=tokens)
        for name, tokens in (("packed", 2000), ("alone", 1))
    )
    for job in (packed, alone):
        run_job(job)
    assert read_json(packed.parent / "adapter" / "training.json")["attention"] == {"kernel": "plain"}
    losses, others = ([entry["loss"] for entry in log_of(job)] for job in (packed, alone))
    assert len(losses) == 6 and losses == pytest.approx(others, abs=1e-5)
    learnt, other = weights_of(packed), weights_of(alone)
    assert max(float((learnt[name] - other[name]).abs().max()) for name in learnt) < 1e-5
    assert max(float(weight.abs().max()) for name, weight in learnt.items() if "lora_B" in name) > 1e-3

    whole = {path.name: path.read_bytes() for path in (packed.parent / "adapter").iterdir()}
    remove(packed.parent / "adapter")
    remove(packed.parent / "work" / "checkpoint-6")
    messages = run_job(packed)
    assert next(one for one in messages if one["event"] == "loaded")["resumed_from"] == "checkpoint-4"
    again = {path.name: path.read_bytes() for path in (packed.parent / "adapter").iterdir()}
    assert again.keys() == whole.keys()
    assert [name for name in whole if whole[name] != again[name] and name != "timing.json"] == []


@pytest.mark.long
def test_five_processes_take_the_same_samples_in_each_step_as_one_and_have_its_losses(tmp_path: Path) -> None:
    """An effective batch of 128 is 128 samples, though 5 does not divide it; an epoch's last step has what is left."""
    write_model(tmp_path / "model")
    settings = ("train.effective_batch=128", "train.epochs=1", "train.dropout=0.05")
    jobs = {
        processes: write_job(tmp_path, str(processes), 300, *settings, processes=processes, pass_tokens=1500)
        for processes in (1, 5)
    }
    steps = {
        processes: [one for one in run_job(job, processes) if one["event"] == "step"] for processes, job in jobs.items()
    }
    for one in steps.values():
        assert [step["step"] for step in one] == [1, 2, 3]
    samples = Samples(jobs[1].parent / "work" / "samples" / "train")
    chosen = [Steps(len(samples), 128, 1, SEED).samples_of(step) for step in range(3)]
    assert [len(numbers) for numbers in chosen] == [128, 128, 44]
    tokens = [sum(samples[number][0].length for number in numbers) for numbers in chosen]
    for one in steps.values():
        assert [step["tokens"] for step in one] == tokens
    logs = [log_of(job) for job in jobs.values()]
    for name in ("loss", "grad_norm", "token_acc", "learning_rate"):
        assert [entry[name] for entry in logs[0]] == pytest.approx([entry[name] for entry in logs[1]], abs=1e-5), name
    one, five = (weights_of(job) for job in jobs.values())
    assert max(float((one[name] - five[name]).abs().max()) for name in one) < 1e-5


def run_jobs(folder: Path, jobs: list[Path], processes: int) -> list[dict[str, Any]]:
    """Have the same processes do jobs one after the other, as the stage does. Returns the messages of the first one."""
    folder.mkdir()
    environment, messages = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    jobs[0].rename(folder / "1.json")
    with subprocess.Popen(command_of(folder, processes), env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith('{"event"'):
                continue
            messages.append(json.loads(line))
            done = [one["event"] for one in messages].count("done")
            if messages[-1]["event"] == "done" and done < len(jobs):
                jobs[done].rename(folder / f"{done + 1}.json")
            elif messages[-1]["event"] == "done":
                remove(folder)
    assert process.returncode == 0
    return messages


@pytest.mark.long
@pytest.mark.parametrize(("processes", "compared"), [(1, ("two", "three")), (2, ("two",))], ids=["one", "two"])
def test_an_adapter_trained_after_others_has_the_bytes_of_one_trained_alone(
    tmp_path: Path, processes: int, compared: tuple[str, ...]
) -> None:
    """Each differs from the one before in its modules, rank, dropout and checkpointing, all of which are taken off."""
    write_model(tmp_path / "model")
    settings = {
        "one": ("train.rank=4", "train.dropout=0.1", "train.gradient_checkpointing=true"),
        "two": ("train.rank=8", "train.target_modules=[q_proj, v_proj]", "train.lora_plus_ratio=8"),
        "three": ("train.rank=4", "train.dropout=0.1", "train.learning_rate=0.003"),
    }
    common = ("train.effective_batch=8", "train.epochs=2", "train.checkpoint_every=2")
    samples = {"one": 20, "two": 24, "three": 20}
    alone, after = (
        {
            name: write_job(tmp_path, f"{where}-{name}", samples[name], *common, *own, processes=processes)
            for name, own in settings.items()
        }
        for where in ("alone", "after")
    )
    files = {name: path.parent for name, path in after.items()}
    messages = run_jobs(tmp_path / "jobs", list(after.values()), processes)
    assert [one["loads_base"] for one in messages if one["event"] == "loaded"] == [True, False, False]
    assert [one["step"] for one in messages if one["event"] == "step"] == [*range(1, 7)] * 3
    for name in compared:
        run_job(alone[name], processes)
        mine, theirs = (
            {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for kind in ("adapter", "work")
                for path in (folder / kind).rglob("*")
                # PEFT writes a set's order into a checkpoint; the finished adapter has it sorted
                if path.is_file() and path.name != "timing.json" and not path.match("checkpoint-*/adapter_config.json")
            }
            for folder in (files[name], alone[name].parent)
        )
        assert "work/checkpoint-6/optimizer.safetensors" in mine and mine.keys() == theirs.keys()
        assert [path for path in mine if mine[path] != theirs[path]] == [], name
