"""How a model makes logits of its last hidden states, for a loss without the logits of all tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Head:
    """How a model makes logits of its last hidden states."""

    module: nn.Module
    """The output embeddings, which may have LoRA."""
    scale: float = 1.0
    """Factor of the logits (Cohere's logit_scale; one over Granite's logits_scaling)."""
    softcap: float | None = None
    """The logits are capped by tanh at this number (Gemma's final_logit_softcapping)."""
    is_sharded: bool = False
    """Whether its weights are sharded over the processes: training gathers them."""

    @staticmethod
    def of(model: Any, is_sharded: bool = False) -> "Head":
        """The head of a model of transformers, by the names in its config."""
        config = model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        softcap = getattr(config, "final_logit_softcapping", None)
        return Head(model.get_output_embeddings(), scale, softcap, is_sharded)

    @property
    def is_plain(self) -> bool:
        """Whether the logits are one product with a frozen weight in the hidden states' type."""
        return type(self.module) is nn.Linear and self.module.bias is None and self.scale == 1.0 and not self.softcap

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained weights of the head."""
        return [weight for weight in self.module.parameters() if weight.requires_grad]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits in float32, [positions, vocabulary], of hidden states [positions, size]."""
        logits: torch.Tensor = self.module(hidden).float() * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits
