"""The train command on the recorded box of eight cards, with a torch that has no CUDA: cards that it must not take, and
cards that are there and cannot be computed on."""

import os
import sys
from types import SimpleNamespace

import pytest

from stages.contract.errors import DoesNotFitError
from stages.engines.cuda import refuse_dead_cards
from tests.hardware.recorded import Box, box
from tests.train.conftest import Training

__all__ = ["box"]


def test_a_training_takes_no_denied_card_and_cards_that_torch_cannot_use_are_told(training: Training, box: Box) -> None:
    environment = {**box.variables, "LORRY_GPU_DENY": "0,2,4,5,6,7"}
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], os.environ.get("PYTHONPATH", "")])
    code, output = training(**environment)
    assert "training processes: 2 " in output, output
    last = output.strip().splitlines()[-1]
    assert (code, "is built without CUDA (NVIDIA driver 535.183.06); install a torch with CUDA" in last) == (4, True), (
        output
    )
    assert f"GPU 1 (NVIDIA A800-SXM4-80GB), {box.uuid(1)}; GPU 3 (" in last
    code, output = training(**{**environment, "CUDA_VISIBLE_DEVICES": f"{box.uuid(2)[:12]},{box.uuid(1)[:12]}"})
    assert (code, f"GPU 1 (NVIDIA A800-SXM4-80GB), {box.uuid(1)}: torch" in output) == (4, True), output
    assert f", {box.uuid(2)}" not in output, "which is denied"
    box.slice(1)
    code, output = training(**{**environment, "LORRY_GPU_DENY": "0,2,3,4,5,6,7"})
    assert (code, "Lorry may use none" in output, "in MIG mode" in output) == (4, True, True), output


def test_a_driver_too_old_for_torch_is_named_with_torchs_cuda(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.recorded["driver_version"] = "450.80.02"
    box.save()
    cuda = SimpleNamespace(is_available=lambda: False)
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="12.8"), __version__="2.10.0+cu128")
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(DoesNotFitError, match=r"GPU 0 \(A800\): torch 2.10.0\+cu128 .*CUDA 12.8 .*driver 450.80.02"):
        refuse_dead_cards(["GPU 0 (A800)"])
    cuda.is_available = lambda: True
    refuse_dead_cards(["GPU 0 (A800)"])
