"""Replaces the training process in tests: it trains nothing, and writes the files that a training writes.

`STAND_IN_LOG` names a file in which it records its process id and which earlier processes still run. `STAND_IN_DEATHS`
names the data sets whose training ends by SIGKILL.
"""

import json
import os
import signal
import sys
from pathlib import Path

from stages.contract.files import read_json, read_jsonl, sha256_file, write_json
from stages.contract.mixes import training_samples, validation_samples
from stages.train.job import Job


def main() -> None:
    job = Job.read(Path(sys.argv[1]) / "1.json")
    name = job.adapter.name
    log = Path(os.environ["STAND_IN_LOG"])
    before = [json.loads(line)["pid"] for line in log.read_text().splitlines()] if log.exists() else []
    noted = {
        "name": name,
        "pid": os.getpid(),
        "living": [pid for pid in before if Path(f"/proc/{pid}").exists()],
        "report": read_json(job.run / "train" / "summary.json"),
        "settings": job.settings.model_dump(mode="json"),
    }
    with log.open("a") as file:
        file.write(json.dumps(noted) + "\n")
    print(f"a library says something of {name}", flush=True)
    if name in os.environ.get("STAND_IN_DEATHS", "").split():
        os.kill(os.getpid(), signal.SIGKILL)
    publish(job)


def publish(job: Job) -> None:
    train = training_samples(read_jsonl(job.train[0]), job.mix, job.seed)
    validation = validation_samples(read_jsonl(job.validation[0]), job.mix)
    folder = job.adapter.with_name(f".{job.adapter.name}")
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text(f"weights of {job.adapter.name}")
    write_json(folder / "adapter_config.json", {"r": job.settings.rank})
    facts = {"steps": 2, "samples": {"train": len(train), "validation": len(validation)}, "mix": job.mix.mix}
    facts |= {"pass_tokens": job.pass_tokens, "tokens": 1}
    facts |= {"left_out": {}, "max_length": job.settings.max_length}
    write_json(folder / "training.json", {**facts, "log": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}]})
    timing = {"train_runtime": 1.5, "train_samples_per_second": 4.0, "train_steps_per_second": 1.3, "train_loss": 1.2}
    write_json(folder / "timing.json", timing)
    files = {path.name: sha256_file(path) for path in folder.iterdir() if path.name != "timing.json"}
    write_json(folder / "made.json", {"key": job.key, "files": files})
    folder.rename(job.adapter)


if __name__ == "__main__":
    main()
