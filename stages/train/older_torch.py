"""ms-swift on torch 2.2, the newest that auto-gptq's kernels load with (image v100-gptq).

ms-swift 4.6 imports two names that torch got later, for sequence parallelism and for FSDP 2. Lorry uses neither, so
that an import is all that they have to stand.
"""

import importlib


def supply_later_names() -> None:
    """Put what ms-swift imports where it looks for it; does nothing where torch has it."""
    import torch.distributed
    import torch.distributed.fsdp

    if not hasattr(torch.distributed, "init_device_mesh"):
        mesh = importlib.import_module("torch.distributed.device_mesh")
        torch.distributed.init_device_mesh = mesh.init_device_mesh  # type: ignore[attr-defined]
    if not hasattr(torch.distributed.fsdp, "FSDPModule"):
        torch.distributed.fsdp.FSDPModule = type("FSDPModule", (), {})  # type: ignore[misc, assignment]
