"""Peak memory and seconds of merging an adapter into a base of many files: Qwen2.5-0.5B's shape, and 7B's if named.

    python -m benchmarks.merging [Qwen2.5-7B]

Weights and adapter are random. A process of its own merges and reports its peak memory, before and after.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import random_models
from benchmarks.random_adapters import make_adapter
from benchmarks.rows import write_rows
from stages.models.shape import read_header, weight_files

FILE_BYTES = {"Qwen2.5-0.5B": 100_000_000}
"""Bytes of a file, where not as in published models: many files of a small model."""

PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch, transformers, peft, safetensors
from stages.models.merge import Merge
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model, adapter, folder = map(Path, sys.argv[1:])
merge = Merge(model, adapter)
before = peak()
merge.write(folder)
print(json.dumps({"before": before, "after": peak()}))
"""


def main() -> None:
    """Measure the models that the command line names, and Qwen2.5-0.5B's shape if it names none."""
    names = sys.argv[1:] or ["Qwen2.5-0.5B"]
    write_rows("merging", [_row(name) for name in names], "python -m benchmarks.merging", by="model")


def _row(name: str) -> dict[str, Any]:
    """Make a model and an adapter, merge them, and return the row."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        random_models.SHARD = FILE_BYTES.get(name, random_models.SHARD)
        random_models.make_model(folder / "model", random_models.CONFIGS[name])
        make_adapter(folder / "adapter", folder / "model", 16, seed=0)
        files = weight_files(folder / "model")
        began = time.monotonic()
        command = [sys.executable, "-c", PROGRAM, *(str(folder / part) for part in ("model", "adapter", "merged"))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.monotonic() - began
        peaks = json.loads(done.stdout.splitlines()[-1])
        return {
            "model": name,
            "files": len(files),
            "model_mb": _mb(sum(path.stat().st_size for path in files)),
            "largest_file_mb": _mb(max(path.stat().st_size for path in files)),
            "largest_tensor_mb": _mb(max(weight.stored_bytes for path in files for weight in read_header(path))),
            "peak_before_writing_mb": _mb(peaks["before"]),
            "peak_mb": _mb(peaks["after"]),
            "seconds": round(seconds, 1),
        }


def _mb(size: int) -> float:
    """Bytes as millions of bytes."""
    return round(size / 1e6, 1)


if __name__ == "__main__":
    main()
