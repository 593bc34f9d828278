"""Seconds that `--help` takes, whole process, median of several; and whether a heavy library is imported on the way.

python -m benchmarks.help
"""

import statistics
import subprocess
import sys
import time

from benchmarks.rows import write_rows

COMMANDS = ("preprocess", "train", "infer", "eval", "lorry")

if __name__ == "__main__":
    rows = []
    for command in COMMANDS:
        seconds = []
        for _ in range(11):
            before = time.perf_counter()
            subprocess.run([sys.executable, "-m", f"entrypoints.{command}", "--help"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - before)
        rows.append(
            {"command": command, "median s": round(statistics.median(seconds), 3), "max s": round(max(seconds), 3)}
        )
    write_rows("help", rows, "python -m benchmarks.help")
