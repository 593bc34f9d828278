"""Training on a GPTQ base with auto-gptq. `test_v100_wheels.py` runs this with the wheels of the image v100-gptq."""

import json
from pathlib import Path

import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from stages.contract.files import read_json
from stages.models.gptq import patch_gptq_kernels
from tests.train.test_lora import adapted, by_lorry, by_peft, compare
from tests.train.test_small_jobs import log_of, run_job, write_job, write_model

GROUP = 32


def packed(layer: nn.Linear) -> QuantLinear:
    """A linear layer in 4 bits, rounded to the nearest."""
    weight = layer.weight.detach()
    groups = weight.reshape(len(weight), -1, GROUP)
    scales = groups.abs().amax(2) / 7
    made = QuantLinear(4, GROUP, weight.shape[1], len(weight), bias=layer.bias is not None, weight_dtype=torch.float32)
    made.pack(layer, scales, torch.full_like(scales, 8), torch.arange(weight.shape[1]) // GROUP)
    return made


def write_gptq_model(folder: Path) -> None:
    """Write the small model of other tests in GPTQ's 4 bits."""
    write_model(folder, hidden_size=64, intermediate_size=96, vocab_size=300)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = {name: weight for name, weight in model.state_dict().items() if "_proj" not in name}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "_proj" in name:
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed(module).state_dict().items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    config = {**read_json(folder / "config.json"), "quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps(config))


def test_gradients_are_peft_s_and_a_training_learns(tmp_path: Path) -> None:
    write_gptq_model(tmp_path / "model")
    with patch_gptq_kernels(tmp_path / "model", on_card=False, training=True):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", torch_dtype=torch.float32, device_map={"": "cpu"}
        )
        assert type(model.model.layers[0].mlp.up_proj).__module__.startswith("auto_gptq.")
        model = adapted(model)
    found = by_peft(model)
    wanted = found[0], {name: gradient.clone() for name, gradient in found[1].items()}
    compare(by_lorry(model), wanted)

    settings = ("train.effective_batch=8", "train.epochs=4", "train.learning_rate=0.01")
    job = write_job(tmp_path, "job", 16, *settings)
    run_job(job)
    losses = [entry["loss"] for entry in log_of(job)]
    assert losses[-1] < 0.9 * losses[0], losses
