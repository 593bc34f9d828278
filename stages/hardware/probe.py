"""Reads what this machine has: CPUs, memory, NVIDIA GPUs."""

import os
import pwd
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
PCI_DEVICES = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class Holder:
    """A process that uses a GPU. Its name and user are `?` if they cannot be seen, as from inside a container."""

    pid: int
    name: str
    user: str
    memory: int | None
    """Bytes on the GPU; None if the driver does not report them."""

    def __str__(self) -> str:
        seen = self.name != "?" or self.user != "?"
        return f"{self.name} ({self.user}, pid {self.pid})" if seen else f"pid {self.pid}, not visible from here,"


@dataclass(frozen=True)
class Gpu:
    """One GPU, as NVML reports it. Memory is in bytes."""

    index: int
    uuid: str
    name: str
    capability: tuple[int, int]
    memory_total: int
    memory_free: int
    driver: str
    processes: tuple[Holder, ...] = ()
    mig: bool = False
    """Whether the GPU is in MIG mode."""
    lost: str = ""
    """NVML's error for a GPU that no longer answers, such as `GPU is lost`; else empty. A lost GPU has the uuid and
    name that NVML still reports, and 0 for capability and memory."""

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})" if self.name else f"GPU {self.index}"

    def identity(self) -> dict[str, Any]:
        """The GPU's fields for a manifest, without those that change over time."""
        passing = ("memory_free", "processes", "lost")
        return {key: value for key, value in asdict(self).items() if key not in passing}


@dataclass(frozen=True)
class Cards:
    """The GPUs that the NVIDIA driver shows, or the reason why it shows none."""

    gpus: tuple[Gpu, ...]
    driver: str = ""
    """The driver's version; empty if it does not answer."""
    problem: str = ""
    """Why an installed driver does not answer, and the cure, in one line; else empty."""


@dataclass(frozen=True)
class Machine:
    """The CPUs and GPUs that this process can use, and the machine's memory."""

    cpus: int
    """CPUs that this process may use."""
    memory_bytes: int
    """Physical memory of the machine, whatever the limit of a container."""
    gpus: tuple[Gpu, ...]
    problem: str = ""
    """Why this machine's GPUs cannot be seen, although a driver is installed; else empty."""


def probe() -> Machine:
    """The CPUs and GPUs that this process can use, and the machine's memory.

    GPUs that CUDA_VISIBLE_DEVICES hides are left out, and so are GPUs that no longer answer or are in MIG mode. There
    are no GPUs, and no error, without an NVIDIA driver, and with LORRY_TARGET=cpu, which the CPU images and the demo
    set.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cards = Cards(()) if os.environ.get("LORRY_TARGET") == "cpu" else read_cards()
    shown = visible_gpus(cards.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=memory,
        gpus=tuple(gpu for gpu in shown if not gpu.lost and not gpu.mig),
        problem=cards.problem,
    )


def visible_gpus(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[Gpu, ...]:
    """The GPUs that are visible if CUDA_VISIBLE_DEVICES is `setting`, in its order; None: all.

    As in CUDA, an entry that does not name one GPU (-1, say) hides itself and all entries after it, and a GPU that is
    named twice hides all. Source: CUDA C++ Programming Guide, "CUDA environment variables".
    """
    if setting is None:
        return gpus
    chosen: list[Gpu] = []
    for name in setting.split(","):
        found = gpus_named(name.strip(), gpus)
        if len(found) != 1:
            break
        if found[0] in chosen:
            return ()
        chosen += found
    return tuple(chosen)


def gpus_named(name: str, gpus: tuple[Gpu, ...]) -> list[Gpu]:
    """The GPU with the index `name`, or the GPUs whose UUID begins with it."""
    if name.upper().startswith("GPU-"):
        return [gpu for gpu in gpus if gpu.uuid.lower().startswith(name.lower())]
    return [gpu for gpu in gpus if name.isascii() and name.isdecimal() and gpu.index == int(name)]


def read_cards() -> Cards:
    """All GPUs that the NVIDIA driver shows, including lost ones. Driver errors are in `problem`, and not raised."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Cards((), problem=_driver_problem(pynvml, error))
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        return Cards(tuple(_gpu(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount())), driver)
    except pynvml.NVMLError as error:
        return Cards((), problem=f"NVIDIA driver: has stopped answering ({error}); see `dmesg`, and reboot")
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def has_card_on_bus() -> bool:
    """Whether an NVIDIA card is on the PCI bus, with or without a driver."""
    for device in PCI_DEVICES.glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):  # NVIDIA; display controllers, compute cards among them
            return True
    return False


def _driver_problem(pynvml: Any, error: Any) -> str:
    """Why NVML cannot reach the driver, and the cure; empty without a driver, or with its library alone and no card."""
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return ""
    if isinstance(error, pynvml.NVMLError_LibRmVersionMismatch):
        return (
            "NVIDIA driver/library version mismatch: the driver was updated, and the old kernel module still runs;"
            " reboot, or end what uses the GPUs and reload it (sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia;"
            " sudo modprobe nvidia)"
        )
    if isinstance(error, pynvml.NVMLError_DriverNotLoaded):
        if not has_card_on_bus():  # the library alone, as in an image or on a build machine
            return ""
        return (
            "NVIDIA driver: its kernel module is not loaded, and a card is on the PCI bus; run `sudo modprobe nvidia`"
            " (after a kernel update, install the driver again)"
        )
    return f"NVIDIA driver: does not answer ({error}); see `nvidia-smi` and `dmesg`"


def _gpu(pynvml: Any, index: int, driver: str) -> Gpu:
    """The GPU with this NVML index. It counts as lost if it refuses a query that every working GPU answers."""
    uuid = name = ""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
        total, free = _memory(pynvml, handle)
        return Gpu(
            index=index,
            uuid=uuid,
            name=name,
            capability=pynvml.nvmlDeviceGetCudaComputeCapability(handle),
            memory_total=total,
            memory_free=free,
            driver=driver,
            processes=_holders(pynvml, handle),
            mig=_is_in_mig_mode(pynvml, handle),
        )
    except pynvml.NVMLError as error:
        return Gpu(index, uuid, name, (0, 0), 0, 0, driver, lost=str(error))


def _memory(pynvml: Any, handle: Any) -> tuple[int, int]:
    """Total and free bytes of a GPU; both are 0 if it does not report them.

    A GPU that shares the CPU's memory does not, nor does one in MIG mode to a process without permission.
    """
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
        return 0, 0
    return int(memory.total), int(memory.free)


def _is_in_mig_mode(pynvml: Any, handle: Any) -> bool:
    """Whether a GPU is in MIG mode; False if the card or the driver does not know MIG."""
    try:
        current, _pending = pynvml.nvmlDeviceGetMigMode(handle)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def _holders(pynvml: Any, handle: Any) -> tuple[Holder, ...]:
    """The processes on a GPU, those with the most memory first; empty if the GPU does not report them.

    Raises NVMLError if the GPU is lost or needs a reset.
    """
    found: dict[int, Any] = {}
    for ask in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in _query(pynvml, ask, handle):
            found.setdefault(process.pid, process.usedGpuMemory)
    holders = [Holder(pid, _process_name(pid), process_user(pid), memory) for pid, memory in found.items()]
    return tuple(sorted(holders, key=lambda holder: (-(holder.memory or 0), holder.pid)))


def _query(pynvml: Any, ask: Callable[[Any], list[Any]], handle: Any) -> list[Any]:
    """NVML's answer to a query; empty if it refuses. Raises NVMLError if the GPU is lost or needs a reset."""
    try:
        return ask(handle)
    except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired):
        raise
    except pynvml.NVMLError:  # not supported, no permission, or an unknown error of old drivers
        return []


def _process_name(pid: int) -> str:
    """The name of a process; `?` if it cannot be seen."""
    try:
        return (PROC / str(pid) / "comm").read_text(errors="replace").strip() or "?"
    except OSError:
        return "?"


def process_user(pid: int) -> str:
    """Name of the user that a process belongs to, or the uid if it has no name; `?` if it cannot be seen."""
    try:
        lines = (PROC / str(pid) / "status").read_text(errors="replace").splitlines()
        uid = next(int(line.split()[1]) for line in lines if line.startswith("Uid:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return "?"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
