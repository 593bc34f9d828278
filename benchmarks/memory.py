"""Estimated against measured peak GPU memory, for real model shapes with random weights.

    LORRY_MODELS=... LORRY_RUNS=... python -m benchmarks.memory [NAME...]

Needs an NVIDIA GPU with 80 GB or more, SmolLM2's tokenizer, and 65 GB of disk for the models, which
benchmarks.random_models makes if they are missing; some settings need two GPUs. Each setting is one training by the
train command, with samples of exactly `Setting.sample_length` tokens. Several run at once if memory allows. The
measured peak is the driver's number for the training process, as in nvidia-smi, sampled ten times a second; with
several GPUs, that of the largest process. Nothing is asserted: estimates that are too low are rows, too.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import descendants
from benchmarks.random_models import CONFIGS, make_model
from benchmarks.rows import write_rows
from stages.contract.files import FileHashes, read_json, write_jsonl
from stages.contract.roots import Roots
from stages.contract.stage import Stage
from stages.hardware.fit import recipe_way
from stages.hardware.memory import Lengths
from stages.hardware.probe import probe
from stages.host.runner import run_stage
from stages.host.runs import open_run
from stages.models.shape import read_shape

ROOTS = Roots.from_environment()
STEPS = 4
ONCE, BUDGET = 6, 70e9
"""Maximum number of trainings at a time, and estimated bytes. While the running trainings need that many bytes or more,
no other starts, so that each finds enough free memory."""
PICTURE = (1120, 1092)
"""Width and height in pixels: 1560 tokens, near the pixel budget of patent pages."""
PICTURE_TOKENS = 1562
"""Tokens of that picture, including its start and end token."""
TEMPLATE_TOKENS = 16
"""Tokens of a sample, not counting its answer, its pictures and the repeated ` the` of its question."""


@dataclass(frozen=True)
class Setting:
    """One training to measure."""

    name: str
    model: str
    length: int
    answer: int
    """Tokens of the answer, including its end token."""
    samples: int = 1
    """Samples of a step on each GPU, which make one pass."""
    sets: tuple[str, ...] = ()
    gpus: int = 1
    picture: bool = False
    shorter: int = 9
    """Tokens by which every other sample is shorter if `samples` is above 1, as in real data."""

    def sample_length(self, sample: int) -> int:
        """Return the number of tokens of sample number `sample`, counted from 0."""
        return self.length - self.shorter * (sample % 2) * (self.samples > 1)

    @property
    def lengths(self) -> Lengths:
        """The lengths of the samples in tokens, in the form that the memory estimate uses."""
        both = [self.sample_length(0), self.sample_length(1)]
        return Lengths(self.length, self.answer, statistics.fmean(both), statistics.pstdev(both))

    @property
    def overrides(self) -> tuple[str, ...]:
        """The recipe overrides of this setting, as KEY=VALUE."""
        return (
            f"model.path={self.model}",
            "preprocess.retrieval.embedder=none",  # no pages are embedded, and this model folder is quick to read
            "train.target_modules=[all-linear]",
            f"train.max_length={self.length}",
            f"infer.max_new_tokens={self.answer}",
            f"infer.max_length={max(2 * self.answer, 8192)}",
            f"train.effective_batch={self.samples * self.gpus}",
            "train.epochs=1",
            "train.checkpoint_every=2",
            "train.dropout=0.05",
            "train.gradient_checkpointing=true",
            *self.sets,
        )


PLAIN, R64 = "train.gradient_checkpointing=false", ("train.rank=64", "train.alpha=64")
SETTINGS = (
    Setting("0.5B, 8 x 512, no checkpointing", "Qwen2.5-0.5B", 512, 480, 8, (PLAIN,)),
    Setting("0.5B, 2048, no checkpointing", "Qwen2.5-0.5B", 2048, 64, 1, (PLAIN,)),
    Setting("0.5B, 8192, r64", "Qwen2.5-0.5B", 8192, 8000, 1, R64),
    Setting("0.5B, 2048, whole sample learnt", "Qwen2.5-0.5B", 2048, 2000),
    Setting("7B, 1024, r64, no checkpointing", "Qwen2.5-7B", 1024, 256, 1, (PLAIN, *R64)),
    Setting("7B, 4 x 2048", "Qwen2.5-7B", 2048, 512, 4),
    Setting("7B, 4 x 2048, mixed lengths", "Qwen2.5-7B", 2048, 512, 4, shorter=1400),
    Setting("7B, 4096", "Qwen2.5-7B", 4096, 64),
    Setting("7B, 8192, whole sample learnt", "Qwen2.5-7B", 8192, 8000),
    Setting("7B, 2048, r64", "Qwen2.5-7B", 2048, 64, 1, R64),
    Setting("7B, 2048, 4-bit", "Qwen2.5-7B", 2048, 64, 1, ("train.load_in_4bit=true",)),
    Setting("7B, 2048, float16", "Qwen2.5-7B", 2048, 1024, 1, ("train.precision=float16",)),
    Setting("14B, 2048", "Qwen2.5-14B", 2048, 512),
    Setting("14B, 1024, r64, no checkpointing", "Qwen2.5-14B", 1024, 64, 1, (PLAIN, *R64)),
    Setting("VL-7B, 2048, a page's picture", "Qwen2.5-VL-7B", 2048, 64, picture=True),
    Setting("VL-7B, 2048, no checkpointing", "Qwen2.5-VL-7B", 2048, 64, 1, (PLAIN,), picture=True),
    Setting("7B, 2048, two GPUs", "Qwen2.5-7B", 2048, 64, gpus=2),
    Setting("7B, 2048, ZeRO-3 on two", "Qwen2.5-7B", 2048, 64, 1, ("train.sharding=zero3",), 2),
    Setting("14B, 8192, ZeRO-3 on two", "Qwen2.5-14B", 8192, 64, 1, ("train.sharding=zero3",), 2),
    Setting("VL-7B, 2048, a picture, ZeRO-3 on two", "Qwen2.5-VL-7B", 2048, 64, 1, ("train.sharding=zero3",), 2, True),
)


# -- samples -------------------------------------------------------------------------------------------------------


def prepare(setting: Setting, name: str) -> None:
    """Write the run `name` with samples of the setting's lengths, as if preprocess had made them.

    Also saves the model's digest in the run's train folder, and writes a placeholder model folder `none`. Raises
    SystemExit if the samples cannot be written.
    """
    none = ROOTS.models / "none"  # the recipe names it as the embedder, so it has to exist
    none.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "none.safetensors"):
        (none / file).write_text("{}")
    run = open_run("patent-qa", "text", str(Path("recipes/data/patent-qa").absolute()), setting.overrides, name)

    def write_samples(stage: Stage) -> None:
        """Write the files of samples that the train command reads."""
        picture = []
        if setting.picture:
            picture = [_write_picture(stage)]
        number = STEPS * setting.samples * setting.gpus
        samples = [_sample(i, setting.sample_length(i), setting.answer, picture) for i in range(number)]
        for split, rows in (("train", samples), ("validation", samples[:2]), ("test", samples[:1])):
            stage.outputs[f"samples/{split}.jsonl"] = write_jsonl(stage.path("samples", f"{split}.jsonl"), rows)

    if run_stage(run, "preprocess", write_samples):
        raise SystemExit(f"{name}: the samples could not be written; see the message above")
    _save_digests(setting.model, run.stage_folder("train"))


def _save_digests(model: str, folder: Path) -> None:
    """Save a model's digest in a stage's folder, where the stage looks for known digests.

    The digest is computed once for all runs, because 30 GB take half a minute.
    """
    known = ROOTS.runs / f".{model}.json"
    if not known.is_file():
        hashes = FileHashes(known)
        hashes.tree_digest(ROOTS.models / model)
        hashes.save()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(known, folder / ".hashes.json")


def _sample(number: int, length: int, answer: int, pictures: list[str]) -> dict[str, Any]:
    """Return a sample of `length` tokens, of which the answer has `answer`. `pictures` are paths."""
    # ` the` is one token of SmolLM2's tokenizer
    words = length - answer - TEMPLATE_TOKENS - len(pictures) * PICTURE_TOKENS
    question = "<image>" * len(pictures) + "x" + " the" * words
    contents = {"system": "s", "user": question, "assistant": "y" + " the" * (answer - 3)}
    messages = [{"role": role, "content": content} for role, content in contents.items()]
    meta = {"group": "all", "source": "all"}
    return {"id": str(number), "messages": messages, "images": pictures, "references": [], "meta": meta}


def _write_picture(stage: Stage) -> str:
    """Write a picture of noise into the run. Returns its path relative to the run."""
    from PIL import Image

    path = stage.path("pages", "page.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(PICTURE, 100).convert("RGB").save(path)
    stage.outputs["pages/"] = None
    return str(path.relative_to(stage.run.folder))


# -- trainings -----------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """One start of the train command, and its peak memory."""

    setting: Setting
    run: str
    expected: int
    """Bytes that the plan is expected to estimate, by which trainings share the GPUs."""
    process: "subprocess.Popen[str]"
    began: float = field(default_factory=time.monotonic)
    peaks: dict[str, int] = field(default_factory=dict)
    """Peak bytes by process id, as the driver counts them."""

    @staticmethod
    def start(setting: Setting, number: int) -> "Training":
        """Write the samples of a setting and start its training. Returns the training.

        `number` is part of the run's name.
        """
        name = f"memory-{number:02}"
        prepare(setting, name)
        opened = open_run("patent-qa", "text", None, setting.overrides, name)
        train = opened.recipe.train
        shape = read_shape(ROOTS.models / setting.model)
        dtype = "bfloat16" if train.precision == "auto" else train.precision
        way = recipe_way(shape, train, setting.gpus, dtype, setting.lengths, probe().gpus[0].memory_total)
        sets = [word for one in setting.overrides for word in ("--set", one)]
        data = str(Path("recipes/data/patent-qa").absolute())
        devices = ",".join(map(str, range(setting.gpus)))
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "entrypoints.train",
                "patent-qa",
                "--profile",
                "text",
                "--run",
                name,
                "--data",
                data,
                *sets,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": devices},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Training(setting, name, way.estimate.total, process)

    def update_peaks(self, used: dict[int, int]) -> None:
        """Update the peaks of this training's processes. `used` has bytes by process id, from the driver."""
        for pid in descendants(self.process.pid):
            if pid in used:
                self.peaks[str(pid)] = max(self.peaks.get(str(pid), 0), used[pid])

    def finish(self) -> dict[str, Any]:
        """Wait for the end of the training. Returns the row with estimated and measured bytes.

        Measured is the largest peak of a process, or 0 if none was seen on a GPU.
        """
        output = self.process.communicate()[0]
        measured = max(self.peaks.values(), default=0)
        folder = ROOTS.runs / self.run / "train"
        manifest = read_json(folder / "manifest.json") or {}
        estimate = manifest.get("estimate", {})  # of the way that the plan chose for the memory that was free
        row: dict[str, Any] = {
            "setting": self.setting.name,
            "exit code": self.process.returncode,
            "seconds": round(time.monotonic() - self.began, 1),
            "estimated bytes": estimate.get("total"),
            "measured bytes": measured,
            "estimate over measured, percent": round(100 * (estimate["total"] / measured - 1), 1)
            if estimate and measured
            else None,
            "parts": estimate,
            "sets": list(self.setting.overrides),
            "lengths": asdict(self.setting.lengths),
            "GPUs": self.setting.gpus,
        }
        if manifest:
            row["torch says"] = manifest.get("gpu_memory")
            row["decisions"] = {made["what"]: made["value"] for made in manifest["decisions"]}
        if self.process.returncode:
            row["said"] = output.strip().splitlines()[-3:]
            log = folder / "log.txt"
            print(output[-800:], log.read_text()[-1500:] if log.is_file() else "", sep="\n--- log\n", flush=True)
        print(json.dumps({key: row[key] for key in list(row)[:6]}), flush=True)
        return row


def measure(settings: list[Setting]) -> list[dict[str, Any]]:
    """Run the trainings of the settings, several at once. Returns a row for each, in the order in which they ended.

    A setting for more GPUs than this machine has does not run; its row comes first and says so.
    """
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    rows: list[dict[str, Any]] = []
    waiting = []
    for number, one in enumerate(settings):
        if one.gpus > len(handles):
            rows.append({"setting": one.name, "not run": f"{one.gpus} GPUs, and {len(handles)} here"})
        else:
            waiting.append((number, one))
    waiting.sort(key=lambda item: -len(item[1].model))  # longest model name first: VL-7B, 0.5B, 14B, 7B
    running: list[Training] = []

    def poll_memory_peaks() -> None:
        """Update the memory peaks of the running trainings every 0.1 s until all have ended."""
        while waiting or running:
            used = {
                process.pid: process.usedGpuMemory or 0
                for handle in handles
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            }
            for training in list(running):
                training.update_peaks(used)
            time.sleep(0.1)

    threading.Thread(target=poll_memory_peaks, daemon=True).start()
    while waiting or running:
        for training in [one for one in running if one.process.poll() is not None]:
            rows.append(training.finish())
            running.remove(training)
        taken = sum(training.expected * training.setting.gpus for training in running)
        if waiting and len(running) < ONCE and taken < BUDGET:
            number, setting = waiting[0]
            running.append(Training.start(setting, number))
            waiting.pop(0)
        time.sleep(0.1)
    return rows


def main() -> None:
    """Measure all settings, or those named as arguments, and write a row for each."""
    wanted = [one for one in SETTINGS if not sys.argv[1:] or one.name in sys.argv[1:]]
    for model in dict.fromkeys(one.model for one in wanted):
        if not (ROOTS.models / model / "model.safetensors.index.json").is_file():
            make_model(ROOTS.models / model, CONFIGS[model])
    rows: list[dict[str, Any]] = []
    try:
        rows += measure(wanted)
    finally:
        write_rows("memory", rows, f"python -m benchmarks.memory {' '.join(sys.argv[1:])}".strip(), by="setting")


if __name__ == "__main__":
    main()
