"""Seconds that `--help`, `lorry plan` and `lorry doctor` take as whole processes: median and maximum of eleven.

python -m benchmarks.help
"""

import statistics
import subprocess
import sys
import time

from benchmarks.rows import write_rows

PLAN = ("plan", "patent-qa", "--profile", "tiny", "--target", "rtx4090")
COMMANDS = {
    **{command: (command, "--help") for command in ("preprocess", "train", "infer", "eval", "lorry")},
    "lorry plan": ("lorry", *PLAN),
    "lorry doctor": ("lorry", "doctor", "--target", "cpu"),
}

if __name__ == "__main__":
    rows = []
    for name, (command, *arguments) in COMMANDS.items():
        seconds = []
        for _ in range(11):
            before = time.perf_counter()
            whole = [sys.executable, "-m", f"entrypoints.{command}", *arguments]
            done = subprocess.run(whole, check=False, capture_output=True)
            seconds.append(time.perf_counter() - before)
        rows.append(
            {
                "command": name,
                "median s": round(statistics.median(seconds), 3),
                "max s": round(max(seconds), 3),
                "exit code": done.returncode,
            }
        )
    write_rows("help", rows, "python -m benchmarks.help")
