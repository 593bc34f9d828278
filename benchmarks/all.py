"""Every benchmark, one after the other: `make bench`."""

import subprocess
import sys

for name in ("render", "help", "demo", "engines"):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
