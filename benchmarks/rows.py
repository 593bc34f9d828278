"""Write a benchmark's rows, with the machine that they were measured on."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.contract.files import read_json, write_json
from stages.hardware.probe import probe

RESULTS = Path(__file__).parent / "results"
SOFTWARE = (
    "torch",
    "transformers",
    "ms-swift",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "gptqmodel",
    "optimum",
    "vllm",
)


def write_rows(name: str, rows: list[dict[str, Any]], command: str, by: str | None = None) -> None:
    """Write rows to results/<name>.json with `command`, today's date and the machine. Print all rows.

    With a GPU, the file also gets the versions of driver and libraries.

    Without `by`, the rows replace the whole file. `by` names the column with the part of the benchmark that a row
    belongs to. Earlier rows of other parts then stay, with the day and the GPUs of their measurement, and a row with
    `not run` never replaces a measured one.
    """
    machine = probe()
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    file = RESULTS / f"{name}.json"
    before = (read_json(file) if by else None) or {}
    kept, new = _kept_and_new_rows(before, rows, by) if before and by else ([], rows)
    value = {
        **before,
        "command": command,
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": model.partition(":")[2].strip(),
            "cpus": machine.cpus,
            "memory_gib": round(machine.memory_bytes / 2**30, 1),
            "gpus": [gpu.name for gpu in machine.gpus],
            "python": platform.python_version(),
        },
        **({"software": _software(machine.gpus[0].driver)} if machine.gpus else {}),
        "rows": [*kept, *new],
    }
    write_json(file, value)
    for row in rows:
        print(row)


def _kept_and_new_rows(
    before: dict[str, Any], rows: list[dict[str, Any]], by: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the earlier rows that stay, each with the day and GPUs of its measurement, and the new rows to write.

    `before` is the content of the row file. `by` is the column that names the part. A new row with `not run` is dropped
    if the part has a measured row.
    """
    run_before = {row.get(by) for row in before["rows"] if "not run" not in row}
    new = [row for row in rows if "not run" not in row or row.get(by) not in run_before]
    replaced = {row.get(by) for row in new}
    place = ", ".join(before.get("machine", {}).get("gpus", []))
    where = {"measured on": f"{before.get('measured', 'an unknown day')}, {place or 'no GPU'}"}
    return [{**where, **row} for row in before["rows"] if row.get(by) not in replaced], new


def _software(driver: str) -> dict[str, str]:
    """Return versions by name: `driver` as given, and the version of each library in SOFTWARE that is installed."""
    found = {"driver": driver}
    for name in SOFTWARE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
