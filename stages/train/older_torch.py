"""ms-swift on torch 2.2, the newest torch that loads auto-gptq's kernels (image v100-gptq).

ms-swift 4.6 imports two names that torch 2.2 lacks, for sequence parallelism and FSDP 2. Lorry uses neither, but the
imports must succeed.
"""

import importlib


def add_missing_names() -> None:
    """Add to torch the two names that ms-swift imports, if they are missing. Does nothing on a newer torch."""
    import torch.distributed
    import torch.distributed.fsdp

    if not hasattr(torch.distributed, "init_device_mesh"):
        mesh = importlib.import_module("torch.distributed.device_mesh")
        torch.distributed.init_device_mesh = mesh.init_device_mesh  # type: ignore[attr-defined]
    if not hasattr(torch.distributed.fsdp, "FSDPModule"):
        torch.distributed.fsdp.FSDPModule = type("FSDPModule", (), {})  # type: ignore[misc, assignment]
