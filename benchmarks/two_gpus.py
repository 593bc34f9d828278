"""Training on two GPUs against one: losses, stops, kills, resuming with another number of GPUs, and speed.

    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.two_gpus [small | large | sharded]

Needs two GPUs, SmolLM2-135M-Instruct's tokenizer in the models folder, and a run `prepared` with the demo's samples,
which `lorry-preprocess patent-qa --profile tiny --run prepared` makes on any machine. The models are Llamas with random
weights. The train command runs in processes of its own. Nothing is asserted: the rows say what happened.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.rows import write_rows
from stages.contract.files import read_json, read_jsonl
from stages.contract.roots import Roots

ROOTS = Roots.from_environment()
SMALL = ("model.path=random-llama", "train.target_modules=[all-linear]", "train.epochs=5")
LARGE = (  # all 104 samples in each step
    *("model.path=random-1.7b", "train.target_modules=[all-linear]", "train.epochs=16", "train.effective_batch=104"),
    *("train.gradient_checkpointing=true", "train.checkpoint_every=1000"),
)
RANDOM_LLAMA = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
RANDOM_LARGE = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "head_dim": 64},
    **{"num_attention_heads": 32, "num_key_value_heads": 32},
}
BOTH = "0,1"
rows: list[dict[str, Any]] = []


def make_model(name: str, shape: dict[str, int]) -> None:
    """Write a model folder: a Llama with random weights in bfloat16 and SmolLM2's tokenizer.

    `shape` has the values that replace those of SmolLM2's config.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source, folder = ROOTS.models / "SmolLM2-135M-Instruct", ROOTS.models / name
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = LlamaForCausalLM(LlamaConfig.from_pretrained(str(source), **shape))  # type: ignore[arg-type]
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / file, folder)


def make_model_in_a_process(name: str, shape: dict[str, int]) -> None:
    """Write a model folder with `make_model` in a new process, so that this process never holds a GPU.

    Keeps an existing model, because trainings may be reading it. Raises CalledProcessError if the new process fails.
    """
    if (ROOTS.models / name / "model.safetensors").is_file():
        return
    code = f"from benchmarks.two_gpus import make_model; make_model({name!r}, {shape!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


class Training:
    """One start of the train command. `finish` completes its row."""

    def __init__(self, what: str, run: str, gpus: str, settings: tuple[str, ...] = SMALL) -> None:
        self.run, self.folder, self.began = run, ROOTS.runs / run / "train", time.monotonic()
        if not self.folder.is_dir():
            shutil.copytree(ROOTS.runs / "prepared" / "preprocess", ROOTS.runs / run / "preprocess")
        self.row: dict[str, Any] = {"what": what, "run": run, "CUDA_VISIBLE_DEVICES": gpus}
        self.events = self.folder / "events.jsonl"
        self.earlier = len(read_jsonl(self.events)) if self.events.is_file() else 0
        sets = [word for setting in settings for word in ("--set", setting)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "entrypoints.train", "patent-qa", "--profile", "tiny", "--run", run, *sets],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def steps(self) -> list[dict[str, Any]]:
        """Return the loss events of this start, one for each logged step.

        Returns none if the file is missing or its last line is not complete yet.
        """
        with suppress(OSError, json.JSONDecodeError):  # there is no file yet, or only half a line
            return [event for event in read_jsonl(self.events)[self.earlier :] if event["event"] == "loss"]
        return []

    def workers(self) -> list[int]:
        """Return the ids of the training processes that are running, sorted by rank."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (path / "cmdline").read_bytes().split(b"\0")
                is_torchrun = b"torch.distributed.run" in command
                if b"stages.train.worker" in command and not is_torchrun and bytes(self.folder) in b" ".join(command):
                    variables = dict(v.split(b"=", 1) for v in (path / "environ").read_bytes().split(b"\0") if v)
                    found.append((int(variables.get(b"RANK", b"0")), int(path.name)))
        return [process for _, process in sorted(found)]

    def wait_for(self, step: int) -> "Training":
        """Wait until the training reaches this step or ends, and then count the processes on each GPU for the row.

        Returns the training.
        """
        while self.process.poll() is None and (not self.steps() or self.steps()[-1]["step"] < step):
            time.sleep(0.01)
        self.row["on GPUs"] = processes_on_gpus()
        return self

    def signal_at(self, sig: signal.Signals, worker: int | None = None, at: int = 20) -> "Training":
        """Wait for step `at`, then send a signal, and start to measure the seconds to the training's end.

        The signal goes to the training process of rank `worker`, or to the stage's process if `worker` is None, and to
        none if that process has ended. Returns the training.
        """
        self.wait_for(at)
        self.row["signal"] = f"{sig.name} to {'the stage' if worker is None else f'process {worker}'}"
        self.row["sent at step"] = self.steps()[-1]["step"] if self.steps() else None
        with suppress(IndexError, ProcessLookupError):
            os.kill(self.process.pid if worker is None else self.workers()[worker], sig)
        self.row["seconds to its end"] = -time.monotonic()
        return self

    def finish(self, alone: bool = True) -> "Training":
        """Wait until the training ends, then complete its row, add it to `rows` and print it. Returns the training.

        Kills the training after 300 s. `alone` means that no other process uses the GPUs: then also waits until the
        GPUs are free and the training processes have ended, for at most 45 s.
        """
        try:
            output, _ = self.process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            self.row["too slow"] = True
            os.killpg(self.process.pid, signal.SIGKILL)
            output, _ = self.process.communicate()
        except BaseException:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        now = time.monotonic()
        if "seconds to its end" in self.row:
            self.row["seconds to its end"] = round(self.row["seconds to its end"] + now, 2)
        self.row |= {"exit code": self.process.returncode, "seconds": round(now - self.began, 1)}
        self.row["said"] = output.strip().splitlines()[-1:]
        if alone:
            while time.monotonic() < now + 45 and (any(processes_on_gpus()) or self.workers()):
                time.sleep(0.1)
            self.row["on GPUs after"] = processes_on_gpus()
            self.row["processes after"] = self.workers()
            self.row["seconds until they were gone"] = round(time.monotonic() - now, 1)
        self.row["checkpoints"] = sorted(path.name for path in self.folder.glob("checkpoints/*/checkpoint-*"))
        self.row |= self._results()
        rows.append(self.row)
        print(json.dumps(self.row), flush=True)
        if self.process.returncode not in (0, 75, -signal.SIGKILL):
            print(output[-1500:], (self.folder / "log.txt").read_text()[-3000:], sep="\n--- log\n", flush=True)
        return self

    def _results(self) -> dict[str, Any]:
        """Return the median seconds per step and, if the training has a manifest, columns from manifest and metrics."""
        times = [event["time"] for event in self.steps()]
        pace = [b - a for a, b in pairwise(times[3:])]
        speed = {"median seconds a step": round(statistics.median(pace), 4)} if pace else {}
        manifest = read_json(self.folder / "manifest.json")
        if manifest is None:
            return speed
        found = speed | {made["what"]: made["value"] for made in manifest["decisions"]}
        found["cards"] = [gpu["name"] for gpu in manifest["gpus"]]
        found["counts"], found["training seconds"] = manifest["counts"], manifest["seconds"]
        found["peak host memory GiB"] = round(manifest["peak_memory_bytes"] / 2**30, 1)
        losses = self.losses()
        found["each step once"] = list(losses) == list(range(1, len(losses) + 1))
        numbers = list(losses.values())
        found["first losses"], found["last losses"] = numbers[:3], numbers[-3:]
        return found

    def losses(self) -> dict[int, float]:
        """Return the training losses by step; the last one if a step was logged twice."""
        return {row["step"]: row["loss"] for row in read_jsonl(self.folder / "metrics.jsonl") if "loss" in row}


def processes_on_gpus() -> list[int]:
    """Return the number of processes on each GPU, as the driver counts them."""
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) for handle in handles]


def add_differences(what: str, one: Training, other: Training) -> None:
    """Add a row with the largest and the mean difference between the losses of two finished trainings.

    Only steps that both have are compared. If a training failed, no row is added.
    """
    if one.process.returncode or other.process.returncode:
        return
    first, second = one.losses(), other.losses()
    apart = [abs(first[step] - second[step]) for step in first.keys() & second.keys()]
    row = {"what": what, "steps": [len(first), len(second)], "largest difference of a step's loss": max(apart)}
    rows.append({**row, "mean difference": round(statistics.mean(apart), 5)})
    print(json.dumps(rows[-1]), flush=True)


def mean_tokens() -> float:
    """Return the mean number of tokens per training sample of the run `prepared`, by the large model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(ROOTS.models / "random-1.7b")
    samples = read_jsonl(ROOTS.runs / "prepared" / "preprocess" / "samples" / "train.jsonl")
    texts = [tokenizer.apply_chat_template(sample["messages"], tokenize=False) for sample in samples]
    return statistics.mean(len(tokenizer(text)["input_ids"]) for text in texts)


def measure_small() -> None:
    """Add rows that compare the losses of a small model on two GPUs, on one, and after stops, kills and resumes.

    Some trainings resume with another number of GPUs. The model is too small to measure speed.
    """
    make_model_in_a_process("random-llama", RANDOM_LLAMA)
    two = Training("two GPUs", "two", BOTH).finish()
    one = Training("one GPU", "one", "0")
    other = Training("the other GPU, stopped; beside it the row below", "one-first", "1")
    other.signal_at(signal.SIGTERM).finish(alone=False)
    add_differences("two GPUs against one", two, one.finish())
    Training("two GPUs, stopped", "stopped", BOTH).signal_at(signal.SIGTERM).finish()
    shutil.copytree(ROOTS.runs / "stopped", ROOTS.runs / "two-first")
    add_differences(
        "stopped and gone on against undisturbed", two, Training("two go on after a stop", "stopped", BOTH).finish()
    )
    add_differences(
        "one after two against undisturbed", two, Training("one goes on after two", "two-first", "0").finish()
    )
    add_differences(
        "two after one against undisturbed", two, Training("two go on after one", "one-first", BOTH).finish()
    )
    Training("two GPUs, a process killed", "killed", BOTH).signal_at(signal.SIGKILL, worker=1).finish()
    Training("they go on, and the stage is killed", "killed", BOTH).signal_at(signal.SIGKILL).finish()
    add_differences("killed twice against undisturbed", two, Training("two go on after both", "killed", BOTH).finish())


def measure_large() -> None:
    """Add rows with speed and losses of a model that keeps a GPU busy: on two GPUs, with a stop, and on one."""
    make_model_in_a_process("random-1.7b", RANDOM_LARGE)
    stopped = Training("1.7B, two GPUs, stopped", "large-two", BOTH, LARGE).signal_at(signal.SIGTERM, at=12).finish()
    two = Training("1.7B, two GPUs go on", "large-two", BOTH, LARGE).wait_for(14).finish()
    one = Training("1.7B, one GPU", "large-one", "0", LARGE).finish()
    add_differences("1.7B: two GPUs against one", two, one)
    add_speed(stopped, one)


def measure_sharded() -> None:
    """Add rows with speed and losses of `measure_large`'s model on two GPUs: without and with ZeRO-3."""
    make_model_in_a_process("random-1.7b", RANDOM_LARGE)
    found = {
        name: Training(f"1.7B, two GPUs, {name}", f"large-{name}", BOTH, (*LARGE, f"train.sharding={name}")).finish()
        for name in ("none", "zero3")
    }
    add_speed(*found.values())
    add_differences("1.7B, two GPUs: zero3 against none", found["none"], found["zero3"])


def add_speed(*trainings: Training) -> None:
    """Add samples and tokens per second to the rows of the trainings that have a time per step of 104 samples."""
    tokens = mean_tokens()
    for training in trainings:
        if "median seconds a step" in training.row:
            rate = 104 / training.row["median seconds a step"]
            training.row |= {"samples a second": round(rate, 1), "tokens a second": round(rate * tokens)}


if __name__ == "__main__":
    for part in sys.argv[1:] or ["small", "large", "sharded"]:
        try:
            {"small": measure_small, "large": measure_large, "sharded": measure_sharded}[part]()
        finally:
            for row in rows:
                row.setdefault("part", part)
            write_rows("two_gpus", rows, f"python -m benchmarks.two_gpus {' '.join(sys.argv[1:])}".strip(), by="part")
