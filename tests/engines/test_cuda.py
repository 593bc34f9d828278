"""GPUs that are here and that torch cannot use."""

from pathlib import Path

import pytest
import torch

from stages.contract.errors import DoesNotFitError
from stages.engines import start_engine
from stages.engines.engine import EngineSettings
from tests.hardware.recorded import Box, box

__all__ = ["box"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU of this machine")
def test_no_engine_computes_on_the_cpu_beside_gpus(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    settings = EngineSettings(tmp_path / "no model", {}, "float32", 8, 1, 64, 0)
    for name in ("transformers", "vllm"):
        with pytest.raises(DoesNotFitError, match=rf"^GPU 3 \(NVIDIA A800-SXM4-80GB\), {box.uuid(3)}: torch .*CUDA"):
            start_engine(name, settings)
    monkeypatch.setenv("LORRY_TARGET", "cpu")
    with pytest.raises(OSError, match="no model"):
        start_engine("transformers", settings)
