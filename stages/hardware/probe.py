"""What this machine has: processors, memory, NVIDIA cards."""

import os
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One card, as NVML reports it. Memory in bytes."""

    index: int
    uuid: str
    name: str
    capability: tuple[int, int]
    memory_total: int
    memory_free: int
    driver: str

    def identity(self) -> dict[str, Any]:
        """What a manifest records of the card."""
        return {key: value for key, value in asdict(self).items() if key != "memory_free"}


@dataclass(frozen=True)
class Machine:
    cpus: int
    """Processors that this process may use."""
    memory_bytes: int
    gpus: tuple[Gpu, ...]


def probe() -> Machine:
    """Look at the machine. A host without the NVIDIA driver has no cards; that is no error.

    CUDA_VISIBLE_DEVICES, which the launcher sets for a local process, hides cards here as it does from CUDA. With
    LORRY_TARGET=cpu, which the CPU images and the demo set, cards that are there are left alone.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = (
        ()
        if os.environ.get("LORRY_TARGET") == "cpu"
        else visible(installed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    )
    return Machine(cpus=len(os.sched_getaffinity(0)), memory_bytes=memory, gpus=gpus)


def visible(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[Gpu, ...]:
    """The cards that CUDA_VISIBLE_DEVICES leaves: numbers or UUIDs, up to the first that is neither."""
    if setting is None:
        return gpus
    chosen: list[Gpu] = []
    for name in setting.split(","):
        found = [gpu for gpu in gpus if name.strip() in (str(gpu.index), gpu.uuid)]
        if not found:
            break
        chosen += found
    return tuple(chosen)


def installed_gpus() -> tuple[Gpu, ...]:
    """Every card that the NVIDIA driver shows; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        return tuple(_gpu(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml: Any, index: int, driver: str) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        index=index,
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        capability=pynvml.nvmlDeviceGetCudaComputeCapability(handle),
        memory_total=memory.total,
        memory_free=memory.free,
        driver=driver,
    )
