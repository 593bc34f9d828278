"""Two-phase training of LLaVA-1.5-7B's shape in 24 GB: losses, peak memory against the estimate, and the connector.

    LORRY_MODELS=... LORRY_RUNS=... python -m benchmarks.two_phases [tiny]

Needs an NVIDIA GPU of 24 GB or more, SmolLM2's tokenizer, and 15 GB of disk for the model with random weights, which
benchmarks.random_models makes if it is missing. On a larger GPU another process holds all memory except what CUDA
offers of 24 GB, so a training that does not fit fails as on a card of 24 GB. The recipe is better-synth's, with smaller
batches (`BATCH`), so that twenty steps take seconds; the pictures are made here. The measured peak is the driver's
number for each phase's process, sampled ten times a second. Nothing is asserted: the rows have the numbers.

`tiny` uses tiny-llava instead, to test the benchmark itself, also on a CPU, where no memory is measured.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import ROOTS
from benchmarks.processes import descendants
from benchmarks.random_models import CONFIGS, make_model
from benchmarks.rows import write_rows
from stages.contract.files import read_json, read_jsonl, sha256_file, write_jsonl
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.hardware.probe import read_cards
from stages.host.planning import USABLE
from stages.host.runner import run_stage
from stages.host.runs import open_run

CARD, GIB = 24, 1024**3
STEPS, BATCH = 20, 8
"""Optimizer steps of each phase, and samples per step; the recipe has 256 and 128."""
NAME = "two-phases"
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
DATA = str(Path("recipes/data/patent-qa").absolute())
"""Any folder will do: the samples are made here."""


def recipe_overrides(model: str) -> tuple[str, ...]:
    """Return the overrides of better-synth's recipe for this benchmark and model, as KEY=VALUE."""
    return (
        *(f"model.path={model}", "preprocess.data_juicer=null"),
        *(f"train.connector.effective_batch={BATCH}", f"train.effective_batch={BATCH}", "train.learning_rate=2e-4"),
        "train.log_every=1",
    )


# -- samples -------------------------------------------------------------------------------------------------------


def prepare(run: Run) -> None:
    """Write the run's samples and pictures, as if preprocess had written them.

    Half of the training samples ask for a caption of the picture, the others for its colour. Each picture shows one
    colour under noise. Raises SystemExit if the samples cannot be written.
    """

    def write_samples(stage: Stage) -> None:
        """Write the samples of all splits, and name them and the pictures as the stage's outputs."""
        rows = [_sample(stage, source, i) for source in ("pretrain", "finetune") for i in range(STEPS * BATCH)]
        for split, part in (("train", rows), ("validation", []), ("test", rows[:1])):
            stage.outputs[f"samples/{split}.jsonl"] = write_jsonl(stage.path("samples", f"{split}.jsonl"), part)
        stage.outputs["pictures/"] = None

    if run_stage(run, "preprocess", write_samples):
        raise SystemExit(f"{run.name}: the samples could not be written; see the message above")


def _sample(stage: Stage, source: str, number: int) -> dict[str, Any]:
    """Return a sample that asks for a picture's caption (`source` is `pretrain`) or its colour (`finetune`).

    Writes the picture if it is missing.
    """
    from PIL import Image

    name, colour = f"{source}{number}", COLOURS[number % len(COLOURS)]
    path = stage.path("pictures", f"{number}.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        size = 320 + number % 7 * 40, 280 + number % 5 * 40
        noise = Image.effect_noise(size, 60).convert("RGB")
        Image.blend(Image.new("RGB", size, colour), noise, 0.3).save(path)
    said = {"pretrain": ("What is shown?", f"A {colour} wall under noise."), "finetune": ("Which colour?", colour)}
    question, answer = said[source]
    messages = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
    shown = [str(path.relative_to(stage.run.folder))]
    meta = {"source": source}
    return {"id": name, "messages": messages, "images": shown, "references": [answer], "meta": meta}


# -- memory --------------------------------------------------------------------------------------------------------

HOLD = """
import sys, torch
free, total = torch.cuda.mem_get_info()
wanted = free - int(sys.argv[1])
held = torch.empty(max(wanted, 1), dtype=torch.uint8, device="cuda")
print(torch.cuda.mem_get_info()[0], flush=True)
sys.stdin.read()
"""


class Neighbour:
    """A process that holds all free memory of the GPU except `left` bytes, until `close` is called.

    `free` is the number of bytes that are then free, as CUDA reports it.
    """

    def __init__(self, left: int) -> None:
        command = [sys.executable, "-c", HOLD, str(left)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.free = int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process, so that its memory is free."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Peaks:
    """Peak GPU memory in bytes of the process `root` and of each process below it, as the driver counts it.

    Measures the first GPU in a thread, from creation until `stop` is called.
    """

    def __init__(self, root: int) -> None:
        self.bytes: dict[int, int] = {}
        self._root, self._stopped = root, threading.Event()
        self._thread = threading.Thread(target=self._poll_memory, daemon=True)
        self._thread.start()

    def _poll_memory(self) -> None:
        """Update the peaks every 0.1 s until `stop` is called."""
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not self._stopped.wait(0.1):
            ours = descendants(self._root)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card):
                if process.pid in ours:
                    most = self.bytes.get(process.pid, 0)
                    self.bytes[process.pid] = max(most, process.usedGpuMemory or 0)

    def stop(self) -> list[int]:
        """Stop measuring. Returns the peak bytes of each process, in the order in which they first used the GPU."""
        self._stopped.set()
        self._thread.join()
        return list(self.bytes.values())


# -- training ------------------------------------------------------------------------------------------------------


def train(sets: list[str]) -> tuple[int, str, float, list[int]]:
    """Run the train command. Returns exit code, output, seconds, and the peak bytes of each process that used the GPU.

    Without a GPU, there are no peaks.
    """
    command = [sys.executable, "-m", "entrypoints.train", "better-synth", "--run", NAME, "--data", DATA, *sets]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks = Peaks(process.pid) if read_cards().gpus else None
    output = process.communicate()[0]
    return process.returncode, output, round(time.monotonic() - began, 1), peaks.stop() if peaks else []


def plan_row(sets: list[str]) -> dict[str, Any]:
    """Return the row with the verdicts of `lorry plan` for a card of 24 GB. The plan does not see the run's samples."""
    options = ["--data", DATA, "--target", "rtx4090", "--gpus", "1"]
    command = [sys.executable, "-m", "entrypoints.lorry", "plan", "better-synth", *options, *sets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    verdicts = [line for line in done.stdout.splitlines() if "fit" in line]
    return {"phase": "lorry plan, 24 GB", "exit code": done.returncode, "said": verdicts}


def phase_row(run: Run, name: str, peak: int | None, free: int | None) -> dict[str, Any]:
    """Return the row of a phase: its losses and, if a peak was measured, the peak against the estimate.

    `name` is `connector` or `tuned`. `peak` and `free` are in bytes; `free` is None if no `Neighbour` holds memory.
    """
    manifest = read_json(run.path("train", "manifest.json"))
    losses = [r["loss"] for r in read_jsonl(run.path("train", "metrics.jsonl")) if r["adapter"] == name and "loss" in r]
    first, last = (sum(part) / len(part) for part in (losses[:3], losses[-3:]))
    label = "connector " if name == "connector" else ""
    decided = {
        made["what"].removeprefix(label): made["value"]
        for made in manifest["decisions"]
        if made["what"].startswith("connector ") == bool(label)
    }
    estimate = manifest.get(f"{label}estimate".replace(" ", "_"))
    row: dict[str, Any] = {
        "phase": name,
        "steps": len(losses),
        "all losses finite": all(map(math.isfinite, losses)),
        "mean of the first three losses": round(first, 4),
        "mean of the last three losses": round(last, 4),
        "loss falls": last < first,
        "tokens per second": manifest.get("tokens_per_second", {}).get(name),
        "decisions": {key: decided[key] for key in ("precision", "effective batch", "fit", "memory") if key in decided},
        "torch says": manifest.get("gpu_memory", {}).get(name),
    }
    if estimate and peak:
        row |= {"estimated bytes": estimate["total"], "measured bytes": peak, "parts": estimate}
        row |= {"estimate over measured, percent": round(100 * (estimate["total"] / peak - 1), 1)}
        row |= {"free bytes": free, "fits": free is None or peak <= free}
    return row


def connector_row(run: Run) -> dict[str, Any]:
    """Return the row of the trained connector: its size, its sha256, and whether manifest and adapter name that sha256.

    Also has the run's decisions on `out of memory`.
    """
    manifest, file = (
        read_json(run.path("train", "manifest.json")),
        run.path("train", "connector", "connector.safetensors"),
    )
    training = read_json(run.path("train", "adapters", "tuned", "training.json"))
    return {
        "phase": "what is handed on",
        "connector, bytes": file.stat().st_size,
        "sha256": (digest := sha256_file(file)),
        "manifest names it": manifest["connector"]["sha256"] == digest,
        "adapter names it": training["connector"] == digest,
        "out of memory": [made["value"] for made in manifest["decisions"] if made["what"] == "out of memory"],
    }


def main() -> None:
    """Train both phases, and print and write the rows. With `tiny`, only print them."""
    tiny = sys.argv[1:] == ["tiny"]
    model = "tiny-llava" if tiny else "LLaVA-1.5-7B"
    if not tiny and not (ROOTS.models / model / "model.safetensors.index.json").is_file():
        make_model(ROOTS.models / model, CONFIGS[model])
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")
    run = open_run("better-synth", None, DATA, recipe_overrides(model), NAME)
    prepare(run)
    sets = [word for one in recipe_overrides(model) for word in ("--set", one)]
    rows = [plan_row(sets)]
    neighbour = None
    try:
        cards = read_cards().gpus
        if cards and cards[0].memory_total > 1.1 * CARD * GIB:
            neighbour = Neighbour(round(USABLE * CARD * GIB))
        code, output, seconds, peaks = train(sets)
        rows.append({"phase": "both", "exit code": code, "seconds": seconds, "said": output.strip().splitlines()[-6:]})
        if code == 0:
            found = [*peaks, None, None]
            free = neighbour.free if neighbour else None
            rows += [phase_row(run, "connector", found[0], free), phase_row(run, "tuned", found[1], free)]
            rows.append(connector_row(run))
        else:
            log = run.path("train", "log.txt")
            print(log.read_text(encoding="utf-8")[-3000:] if log.is_file() else output, flush=True)
    finally:
        if neighbour:
            neighbour.close()
        for row in rows:
            print(json.dumps(row), flush=True)
        if not tiny:
            write_rows("two_phases", rows, "python -m benchmarks.two_phases")


if __name__ == "__main__":
    main()
