"""What ms-swift imports is there with a torch that is too old for it, and is left alone with a newer one."""

import pytest

from stages.train.older_torch import add_missing_names


def test_names_that_torch_2_2_has_not_are_supplied(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed
    import torch.distributed.fsdp
    from torch.distributed.device_mesh import init_device_mesh

    monkeypatch.delattr(torch.distributed, "init_device_mesh")
    monkeypatch.delattr(torch.distributed.fsdp, "FSDPModule")
    add_missing_names()
    assert torch.distributed.init_device_mesh is init_device_mesh
    assert isinstance(torch.distributed.fsdp.FSDPModule, type)


def test_a_newer_torch_keeps_its_own() -> None:
    import torch.distributed.fsdp

    before = torch.distributed.init_device_mesh, torch.distributed.fsdp.FSDPModule
    add_missing_names()
    assert (torch.distributed.init_device_mesh, torch.distributed.fsdp.FSDPModule) == before
