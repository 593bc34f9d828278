"""The first phase of training, in ms-swift's trainer: it trains and saves only the connector of a whole model.

checkpoint-<step>/connector.safetensors   the connector's weights in float32, named as in the base's own files
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.contract.errors import UsageError
from stages.models.connector import FILE, names_in_files
from stages.train.together import Together


def patch_connector_training(trainer: Any, model: Path, together: Together) -> None:
    """Convert the trainable weights to float32 and patch a transformers Trainer to save and load only these weights.
    Call it before training.

    Like LoRA weights, the connector is trained in float32 even if the base is in 16 bits. `model` is the model's
    folder. Raises UsageError if the model has no connector, or no file in its folder has one of the connector's
    weights.
    """
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    if not trained:
        raise UsageError(f"train.connector: {model} has no connector; use a vision-language model")
    names = names_in_files(model, list(trained))
    for weight in trained.values():
        weight.data = weight.data.float()

    def save(output_dir: str, _internal_call: bool = False) -> None:
        """Save the connector's weights to a folder. Only the first process writes."""
        if together.is_first:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            weights = {names[name]: weight.detach().cpu().contiguous() for name, weight in trained.items()}
            save_file(weights, Path(output_dir) / FILE, metadata={"format": "pt"})

    def load(checkpoint: str, model: Any = None) -> None:
        """Copy the connector in the folder `checkpoint` into the model in training. `model` is ignored."""
        weights = load_file(Path(checkpoint) / FILE)
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(weights[names[name]])

    trainer.save_model, trainer._load_from_checkpoint = save, load
