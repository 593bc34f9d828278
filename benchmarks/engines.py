"""vLLM against transformers on the demo's test set: seconds including the engine's start, and answers that differ.

    python -m benchmarks.engines

Needs the demo's run (`make demo`). Each engine answers the same prompts with the base and with the adapter,
transformers first.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.rows import write_rows
from stages.contract.files import read_jsonl

ROOT = Path(__file__).parents[1]
MODELS = ("base", "tuned")


def answer(engine: str) -> dict[str, Any]:
    """Answer the demo's test set with an engine, in a copy of the demo's run.

    Returns `seconds` of the whole command, `start` (seconds of the engine's start), and `predictions` (records by
    model). Deletes the copy at the end. If the command fails, raises CalledProcessError and leaves the copy.
    """
    run = ROOT / "runs" / f"bench-{engine}"
    shutil.rmtree(run, ignore_errors=True)
    for stage in ("preprocess", "train"):
        shutil.copytree(ROOT / "runs" / "demo" / stage, run / stage)
    command = [sys.executable, "-m", "entrypoints.infer", "patent-qa", "--profile", "tiny", "--run", run.name]
    before = time.perf_counter()
    environment = {**os.environ, "LORRY_DATA": str(ROOT / "recipes" / "data")}
    subprocess.run([*command, "--set", f"infer.engine={engine}"], check=True, cwd=ROOT, env=environment)
    seconds = time.perf_counter() - before
    start = json.loads((run / "infer" / "manifest.json").read_text())["engine_start_seconds"]
    predictions = {model: read_jsonl(run / "infer" / "predictions" / f"{model}.jsonl") for model in MODELS}
    shutil.rmtree(run)
    return {"seconds": seconds, "start": start, "predictions": predictions}


if __name__ == "__main__":
    found = {engine: answer(engine) for engine in ("transformers", "vllm")}
    rows: list[dict[str, Any]] = [
        {"engine": engine, "seconds": round(one["seconds"], 1), "of which engine start": one["start"]}
        for engine, one in found.items()
    ]
    for model in MODELS:
        pairs = zip(*(found[engine]["predictions"][model] for engine in found), strict=True)
        differing = [(a["id"], a["text"], b["text"]) for a, b in pairs if a["text"] != b["text"]]
        rows.append({"model": model, "answers that differ": len(differing), "which": differing})
    write_rows("engines", rows, "python -m benchmarks.engines")
