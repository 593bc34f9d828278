"""A stand-in for pynvml that plays a recorded box: constants, exceptions and all else are the real package's.

LORRY_NVML_SNAPSHOT names the JSON file, which is read again at each nvmlInit: a test that changes it changes the box.
Put this folder on PYTHONPATH, or this module into sys.modules. `tests/hardware/recorded.py` does.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


def _real() -> ModuleType:
    here = Path(__file__).parent.resolve()
    places = [place for place in sys.path if Path(place or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("pynvml", places)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get("pynvml")
    sys.modules["pynvml"] = module  # it looks itself up there
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop("pynvml")
        if before is not None:
            sys.modules["pynvml"] = before
    return module


_pynvml = _real()
globals().update({name: value for name, value in vars(_pynvml).items() if not name.startswith("__")})

_box: dict[str, Any] | None = None


def _fail(name: str) -> None:
    """Raise the error of a name such as GPU_IS_LOST, as the real package's class."""
    raise _pynvml.NVMLError(getattr(_pynvml, f"NVML_ERROR_{name}"))


def _opened() -> dict[str, Any]:
    if _box is None:
        _fail("UNINITIALIZED")
    assert _box is not None
    return _box


def _answer(card: dict[str, Any], function: str) -> dict[str, Any]:
    """The card, unless it refuses the function."""
    errors = card.get("errors", {})
    error = errors.get(function) or errors.get("*")
    if error:
        _fail(error)
    return card


def nvmlInit() -> None:  # noqa: N802 - NVML's names
    global _box  # noqa: PLW0603
    box = json.loads(Path(os.environ["LORRY_NVML_SNAPSHOT"]).read_text(encoding="utf-8"))
    if box.get("init_error"):
        _fail(box["init_error"])
    _box = box


def nvmlShutdown() -> None:  # noqa: N802
    global _box  # noqa: PLW0603
    _opened()
    _box = None


def nvmlSystemGetDriverVersion() -> str:  # noqa: N802
    return str(_opened()["driver_version"])


def nvmlDeviceGetCount() -> int:  # noqa: N802
    return len(_opened()["cards"])


def nvmlDeviceGetHandleByIndex(index: int) -> dict[str, Any]:  # noqa: N802
    cards = _opened()["cards"]
    if not 0 <= index < len(cards):
        _fail("INVALID_ARGUMENT")
    return _answer(cards[index], "nvmlDeviceGetHandleByIndex")


def nvmlDeviceGetUUID(handle: dict[str, Any]) -> str:  # noqa: N802
    return str(_answer(handle, "nvmlDeviceGetUUID")["uuid"])


def nvmlDeviceGetName(handle: dict[str, Any]) -> str:  # noqa: N802
    return str(_answer(handle, "nvmlDeviceGetName")["name"])


def nvmlDeviceGetCudaComputeCapability(handle: dict[str, Any]) -> tuple[int, int]:  # noqa: N802
    major, minor = _answer(handle, "nvmlDeviceGetCudaComputeCapability")["cuda_compute_capability"]
    return major, minor


def nvmlDeviceGetMemoryInfo(handle: dict[str, Any]) -> SimpleNamespace:  # noqa: N802
    return SimpleNamespace(**_answer(handle, "nvmlDeviceGetMemoryInfo")["memory_info"])


def nvmlDeviceGetMigMode(handle: dict[str, Any]) -> list[int]:  # noqa: N802
    return list(_answer(handle, "nvmlDeviceGetMigMode")["mig_mode"])


def _processes(handle: dict[str, Any], function: str, key: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(**process) for process in _answer(handle, function)[key]]


def nvmlDeviceGetComputeRunningProcesses(handle: dict[str, Any]) -> list[SimpleNamespace]:  # noqa: N802
    return _processes(handle, "nvmlDeviceGetComputeRunningProcesses", "compute_processes")


def nvmlDeviceGetGraphicsRunningProcesses(handle: dict[str, Any]) -> list[SimpleNamespace]:  # noqa: N802
    return _processes(handle, "nvmlDeviceGetGraphicsRunningProcesses", "graphics_processes")
