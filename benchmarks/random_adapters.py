"""Write LoRA adapters with random weights in PEFT's format, for benchmarks that do not train any."""

from pathlib import Path

from stages.contract.files import write_json
from stages.contract.recipe import Adapter, Train
from stages.hardware.memory import adapted_modules
from stages.models.shape import read_shape


def make_adapter(folder: Path, model: Path, rank: int, seed: int) -> None:
    """Write a LoRA adapter with random weights for the modules of `model` that training adapts by default.

    `folder` gets PEFT's two files. `rank` is the LoRA rank. The same seed gives the same weights.
    """
    import torch
    from safetensors.torch import save_file

    shape = read_shape(model)
    settings = Train(adapters=[Adapter(name="random")])
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    modules = adapted_modules(shape, settings)
    for module in modules:
        inputs, outputs = shape.linears[module]
        for name, size in (("A", (rank, inputs)), ("B", (outputs, rank))):
            weights[f"base_model.model.{module}.lora_{name}.weight"] = torch.randn(size, generator=generator) * 0.01
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    if shape.vision is not None:  # modules of the vision tower have the same names and get no LoRA
        targets = [rf"^(.*language_model(?=\.).*\.({'|'.join(targets)}))$"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "task_type": "CAUSAL_LM", "bias": "none"}
    config |= {"target_modules": targets if shape.vision is None else targets[0], "base_model_name_or_path": model.name}
    write_json(folder / "adapter_config.json", config)
