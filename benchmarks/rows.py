"""Write a benchmark's rows, with the machine they were measured on."""

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
    """Keep rows in results/<name>.json and print them.

    With `by`, a column that says which part of the benchmark a row is of, rows that are there of other parts are kept,
    and say when and on what they were measured. A part that could not be run here (`not run`) replaces none.
    """
    machine = probe()
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    file = RESULTS / f"{name}.json"
    before = (read_json(file) if by else None) or {}
    kept, new = _merged(before, rows, by) if before and by else ([], rows)
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


def _merged(
    before: dict[str, Any], rows: list[dict[str, Any]], by: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The earlier rows that stay, and the new ones."""
    run_before = {row.get(by) for row in before["rows"] if "not run" not in row}
    new = [row for row in rows if "not run" not in row or row.get(by) not in run_before]
    replaced = {row.get(by) for row in new}
    place = ", ".join(before.get("machine", {}).get("gpus", []))
    where = {"measured on": f"{before.get('measured', 'an unknown day')}, {place or 'no GPU'}"}
    return [{**where, **row} for row in before["rows"] if row.get(by) not in replaced], new


def _software(driver: str) -> dict[str, str]:
    found = {"driver": driver}
    for name in SOFTWARE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
