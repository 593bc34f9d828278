"""Write a benchmark's rows, with the machine they were measured on."""

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.contract.files import write_json
from stages.hardware.probe import probe

RESULTS = Path(__file__).parent / "results"


def write_rows(name: str, rows: list[dict[str, Any]], command: str) -> None:
    """Keep rows in results/<name>.json and print them."""
    machine = probe()
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    value = {
        "command": command,
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": model.partition(":")[2].strip(),
            "cpus": machine.cpus,
            "memory_gib": round(machine.memory_bytes / 2**30, 1),
            "gpus": [gpu.name for gpu in machine.gpus],
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    write_json(RESULTS / f"{name}.json", value)
    for row in rows:
        print(row)
