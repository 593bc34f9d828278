"""Trains one adapter by the training process of an older Lorry, for `benchmarks.peers`, and prints its messages.

    PYTHONPATH=CHECKOUT python benchmarks/peer_worker.py MODEL SAMPLES SETTINGS

It imports `stages` of CHECKOUT, revision da6deed, whose `Job` still had micro_batch. SETTINGS is JSON: `batch`,
`samples` (of a pass) and `checkpointed`.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> None:
    """Train, and print each message of the training process as a line of JSON."""
    from stages.contract.recipe import Adapter, Model, Train
    from stages.hardware.probe import probe
    from stages.train import torchrun
    from stages.train.job import Job

    model, samples, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    folder, gpus = Path(tempfile.mkdtemp()), probe().gpus
    (folder / "work").mkdir()
    batch, of_a_pass, name = settings["batch"], settings["samples"], Adapter(name="tuned")
    train: dict[str, Any] = {"adapters": [name], "dropout": 0.0, "effective_batch": batch, "micro_batch": of_a_pass}
    train |= {"log_every": 1, "checkpoint_every": 10**6, "max_length": 8192}
    train |= {"gradient_checkpointing": settings["checkpointed"]}
    read, write = os.pipe()
    values: dict[str, Any] = {
        "model": model,
        "work": folder / "work",
        "scratch": folder / "scratch",
        "adapter": folder / "work" / "finished" / "tuned",
        "run": folder,
        "key": "key",
        "mix": name,
        "train": [samples],
        "validation": [samples],
        "seed": 0,
        "dtype": "bfloat16" if gpus else "float32",
        "sharding": "none",
        "micro_batch": of_a_pass,
        "accumulation": batch // of_a_pass,
        "processes": 1,
        "eval_micro_batch": of_a_pass,
        "evaluate": False,
        "use_cpu": not gpus,
        "cards": [f"{gpu}, {gpu.uuid}" for gpu in gpus],
        "model_settings": Model(path=str(model), swift_type="qwen2"),
        "settings": Train(**train),
        "progress": write,
    }
    as_json: Any = torchrun._json_value  # of that revision
    (folder / "job.json").write_text(json.dumps(as_json(asdict(Job(**values)))))
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "stages.train.worker", str(folder / "job.json")]
        worker = subprocess.Popen(command, pass_fds=[write], stdout=log, stderr=log)
    os.close(write)
    with os.fdopen(read) as messages:
        for line in messages:
            print(json.dumps({"event": None, **json.loads(line)}), flush=True)
    if worker.wait():
        sys.exit((folder / "log.txt").read_text()[-3000:])


if __name__ == "__main__":
    main()
