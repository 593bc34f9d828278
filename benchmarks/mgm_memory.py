"""Memory that torch allocates in training steps of both phases, against the estimate, for MGM-2B with random weights.

    python -m benchmarks.mgm_memory

Needs an NVIDIA GPU of 24 GB, transformers and peft, but not ms-swift: it runs forward and backward under autocast in
bfloat16 and AdamW's step, as ms-swift's trainer does. It compares the parts that do not depend on allocator and
context: weights, adapter or connector, gradients, moments, activations and logits. Not run on any GPU yet.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.rows import write_rows
from stages.contract.recipe import Train
from stages.hardware.fit import recipe_way
from stages.hardware.memory import Lengths
from stages.models.mgm import CONNECTORS, MgmConfig, MgmForConditionalGeneration
from stages.models.shape import ModelShape, Weight, read_shape

ANSWER = 64
"""Tokens at a sample's end that have a loss."""
CASES = (("lora", 1, 1024, True), ("lora", 4, 1024, True), ("lora", 4, 1024, False), ("connector", 1, 1024, True))
CASES += (("connector", 4, 1024, True), ("connector", 2, 1024, False))
"""Phase, samples of a pass, tokens of a sample including 576 of a picture, gradient checkpointing."""


def training_settings(phase: str, samples: int, checkpointing: bool) -> Train:
    """Return the training settings of a phase (`lora` or `connector`), with one pass per optimizer step."""
    fields = {"adapters": [{"name": "a"}], "rank": 16, "dropout": 0.0}
    fields |= {"effective_batch": samples, "gradient_checkpointing": checkpointing}
    connector = {"effective_batch": samples}
    train = Train.model_validate({**fields, "connector": connector} if phase == "connector" else fields)
    return train.connector_settings() if phase == "connector" else train


def model_to_train(phase: str, checkpointing: bool) -> Any:
    """Return MGM-2B on the GPU, with random weights in bfloat16, in training mode.

    Only the weights that the phase trains, those of LoRA or the connector, are in float32 and need gradients.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model: Any = MgmForConditionalGeneration(MgmConfig()).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if phase == "connector":
        for name in CONNECTORS:
            getattr(model.model, name).float().requires_grad_(True)
        return model.train()
    modules = r"model\.language_model\.layers\..*_proj"
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=modules))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.train()


def measure_peak(phase: str, samples: int, length: int, checkpointing: bool) -> float:
    """Run three training steps with samples of `length` tokens.

    Returns the peak of the memory that torch allocates, in GB of 1e9 bytes.
    """
    model = model_to_train(phase, checkpointing)
    config = MgmConfig()
    pictures = config.tokens_across**2
    tokens = torch.randint(1000, 200000, (samples, length), device="cuda")
    tokens[:, 1 : 1 + pictures] = config.image_token_id
    labels = tokens.clone()
    labels[:, :-ANSWER] = -100
    pixels = torch.randn(samples, 3, 768, 768, device="cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            # like ms-swift, compute logits only at positions with a loss
            output = model(input_ids=tokens, pixel_values=pixels, logits_to_keep=ANSWER + 1)
            logits = output.logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, -ANSWER:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del output, logits, loss
    return torch.cuda.max_memory_allocated() / 1e9


def mgm_shape() -> ModelShape:
    """Return MGM-2B's shape, equal to what `read_shape` returns for the model's folder."""
    # a folder with all weights would have 6 GB, so only the config is real
    with torch.device("meta"):
        state = MgmForConditionalGeneration(MgmConfig()).state_dict()
    weights = (Weight(name, tuple(t.shape), "BF16") for name, t in state.items() if name != "lm_head.weight")
    with tempfile.TemporaryDirectory() as name:
        MgmConfig().save_pretrained(name)
        save_file({"none": torch.zeros(1)}, Path(name) / "model.safetensors")
        return replace(read_shape(Path(name)), weights=tuple(weights))


def main() -> None:
    """Measure all CASES, and write a row for each with the measured and the estimated GB."""
    shape = mgm_shape()
    rows = []
    for phase, samples, length, checkpointing in CASES:
        train = training_settings(phase, samples, checkpointing)
        memory = torch.cuda.mem_get_info()[1]
        parts = recipe_way(shape, train, 1, "bfloat16", Lengths(length, ANSWER), memory).estimate.parts()
        expected = sum(size for part, size in parts.items() if part not in ("framework", "fragmentation")) / 1e9
        found = measure_peak(phase, samples, length, checkpointing)
        torch.cuda.empty_cache()
        rows.append(
            {
                **{"card": torch.cuda.get_device_name(), "phase": phase, "samples": samples, "tokens": length},
                **{"checkpointing": checkpointing, "allocated GB": round(found, 3), "estimated GB": round(expected, 3)},
                "off by": f"{100 * (expected / found - 1):+.1f} %",
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    write_rows("mgm_memory", rows, "python -m benchmarks.mgm_memory")


if __name__ == "__main__":
    main()
