"""Run four short benchmarks that need neither a GPU nor images, one after the other: `make bench`."""

import subprocess
import sys

for name in ("render", "help", "demo", "engines"):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
