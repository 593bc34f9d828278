"""train: one LoRA adapter for each entry of `train.adapters`, each trained in a process of its own.

The process is ended with its memory before anything else is tried on the card, and a crash of it is not ours.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from stages.contract.errors import Exit, InterruptedRunError, LorryError
from stages.contract.files import read_json, remove, write_json, write_jsonl
from stages.contract.recipe import Adapter
from stages.contract.stage import Stage
from stages.contract.stop import die_with_parent
from stages.hardware.batch import plan_batch
from stages.hardware.probe import probe
from stages.hardware.targets import load_targets, target_of
from stages.train.worker import Job


def work(stage: Stage) -> None:
    """The stage's work, for `run_stage`."""
    recipe = stage.run.recipe
    machine = probe()
    target = target_of(machine, load_targets())
    stage.decide("precision", target.dtype, f"target {target.name}")
    gpus = min(len(machine.gpus), 1)  # one process; several GPUs come with torchrun
    batch = plan_batch(recipe.train.effective_batch, recipe.train.micro_batch, gpus)
    stage.decide("effective batch", str(batch), f"train.effective_batch is {recipe.train.effective_batch}")
    log: list[dict[str, Any]] = []
    for adapter in recipe.train.adapters:
        folder = stage.path("adapters", adapter.name)
        if not folder.is_dir():
            job = Job(
                model=stage.run.model(recipe.model.path, "model.path"),
                work=stage.path("checkpoints", adapter.name),
                adapter=folder,
                train=[stage.run.path("preprocess", "samples", "train.jsonl")],
                validation=[stage.run.path("preprocess", "samples", "validation.jsonl")],
                seed=recipe.seed,
                dtype=target.dtype,
                micro_batch=batch.micro_batch,
                accumulation=batch.accumulation,
                use_cpu=not machine.gpus,
                model_settings=recipe.model,
                settings=recipe.train,
                reports=-1,
            )
            _run_worker(stage, adapter, job)
        training = read_json(folder / "training.json")
        stage.counts[f"{adapter.name} samples"] = training["samples"]["train"]
        stage.counts[f"{adapter.name} steps"] = training["steps"]
        for split, samples in training["left_out"].items():
            for sample in samples:
                stage.skip(sample, "longer than train.max_length", f"{split}, adapter {adapter.name}")
        log += [{"adapter": adapter.name, **entry} for entry in training["log"]]
        for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
            stage.outputs[f"adapters/{adapter.name}/{name}"] = None
        stage.stop.check()
    stage.outputs["metrics.jsonl"] = write_jsonl(stage.path("metrics.jsonl"), log)
    remove(stage.path("checkpoints"))  # everything of them that is used from here on is in the adapters


def _run_worker(stage: Stage, adapter: Adapter, job: Job) -> None:
    """Train one adapter. Raises what the worker's exit code says."""
    reading, writing = os.pipe()
    job_file = stage.path("checkpoints", adapter.name, "job.json")
    write_json(job_file, _plain({**asdict(job), "reports": writing}))
    with subprocess.Popen(
        [sys.executable, "-m", "stages.train.worker", str(job_file)],
        pass_fds=[writing, stage.lock],  # a worker that outlives this process still holds the stage
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
    ) as worker:
        os.close(writing)
        stage.stop.pass_on_to(worker)
        error = _follow(stage, adapter, reading)
        code = worker.wait()
    if code == Exit.DONE:
        return
    if code == Exit.INTERRUPTED:
        raise InterruptedRunError(error or "stopped; run the same command again")
    if code < 0:
        name = signal.Signals(-code).name
        raise LorryError(
            f"training {adapter.name} was ended by {name}"
            + (" (the kernel does that when memory runs out)" if name == "SIGKILL" else "")
            + f"; run the same command again to go on from the last checkpoint; log: {stage.path('log.txt')}"
        )
    failure = LorryError(f"training {adapter.name} failed: {error}; log: {stage.path('log.txt')}")
    failure.exit_code = Exit(code) if code in tuple(Exit) else Exit.CRASHED
    raise failure


def _follow(stage: Stage, adapter: Adapter, reading: int) -> str | None:
    """Show the worker's reports until it ends. Returns its last error text."""
    activity, loss, error = f"train {adapter.name}", None, None
    with os.fdopen(reading, "r", encoding="utf-8") as reports:
        while True:
            line = reports.readline()
            if not line:
                return error
            report = json.loads(line)
            if report["event"] == "step":
                stage.events.progress(activity, report["step"], report["total"], "steps", loss=loss)
            elif report["event"] == "loss":
                loss = report["loss"]
                stage.events.emit("loss", adapter=adapter.name, step=report["step"], loss=loss)
            elif report["event"] == "loaded":
                resumed = f", resuming from {report['resumed_from']}" if report["resumed_from"] else ""
                stage.events.say(f"{activity}: {report['samples']['train']} samples{resumed}")
                if resumed:
                    stage.decisions.append({"what": "resumed", "value": report["resumed_from"], "why": adapter.name})
            elif report["event"] == "error":
                error = report["text"]


def _plain(value: Any) -> Any:
    """A job as JSON values."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return value
