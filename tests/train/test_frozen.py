"""LoRA over a base in 4 bits: the loss and the gradients are PEFT's; the parts that training does not change."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stages.models.gptq import patch_gptq_kernels
from stages.train.frozen import base_gradient, base_product
from tests.conftest import REPOSITORY
from tests.train.test_lora import SMALL, adapted, by_lorry, by_peft, compare

NF4 = REPOSITORY / ".venv" / "nf4"
"""Where `make test` puts bitsandbytes."""


class OddLinear(nn.Module):
    """A linear layer of a library that has no function for its weight; its product is in float64."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.infeatures, self._packed = weight.shape[1], weight.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ self._packed.t()).to(x.dtype)


@pytest.mark.parametrize("kind", ["own", "odd"])
def test_a_frozen_layer_s_product_and_gradient_are_autograd_s(kind: str) -> None:
    torch.manual_seed(0)
    own = nn.Linear(24, 40, bias=kind == "own")
    layer = own if kind == "own" else OddLinear(own.weight.detach())
    x, d_output, earlier = torch.randn(7, 24, requires_grad=True), torch.randn(7, 40), torch.randn(7, 24)
    (wanted,) = torch.autograd.grad(own(x), x, d_output)
    with torch.no_grad():
        assert torch.allclose(base_product(layer, x), own(x), atol=1e-6)
    assert torch.allclose(base_gradient(layer, d_output), wanted, atol=1e-6)
    assert torch.allclose(base_gradient(layer, d_output, into=earlier.clone()), earlier + wanted, atol=1e-6)


def compare_with_peft(model: Any) -> None:
    """Compare the gradients of a pack with PEFT's for its samples alone, on the same model."""
    found = by_peft(model.train())  # bitsandbytes' layers have no gradient in evaluation
    wanted = found[0], {name: gradient.clone() for name, gradient in found[1].items()}
    compare(by_lorry(model), wanted)


def test_on_a_gptq_base_gradients_are_peft_s(gptq_base: Path) -> None:
    with patch_gptq_kernels(gptq_base, on_card=False, training=True):
        model = AutoModelForCausalLM.from_pretrained(gptq_base, dtype=torch.float32, device_map={"": "cpu"})
        del model.model.layers[2:]
        compare_with_peft(adapted(model))


def test_on_an_nf4_base_gradients_are_peft_s(tmp_path: Path) -> None:
    """In a process of its own: where bitsandbytes can be imported, PEFT and transformers import it."""
    assert (NF4 / "bitsandbytes").is_dir(), "no bitsandbytes; `make test` installs it"
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{NF4}"}
    code = f"from tests.train.test_frozen import compare_on_nf4; compare_on_nf4({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "Linear4bit", done.stdout + done.stderr[-3000:]


def compare_on_nf4(folder: str) -> None:
    """Load a model in NF4 with double quantisation, as training does, and compare. Prints the kind of its layers."""
    from transformers import BitsAndBytesConfig

    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantised = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=quantised
    )
    kind = type(model.model.layers[0].mlp.gate_proj).__name__
    compare_with_peft(adapted(model))
    print(kind)
