"""DeepSpeed's ZeRO-3 for a base that does not fit one GPU: each process keeps a part of every frozen weight, and a
layer is whole only while it computes.

DeepSpeed gets the frozen base and nothing else. The trained weights are small beside it: each process has all of them,
in float32, so gradients, optimizer and checkpoints are the same with and without ZeRO-3. Every pass is a collective:
all processes make the same number of passes through the same layers (`packing.level`). Nothing is offloaded to the
CPU's memory. ZeRO: https://arxiv.org/abs/1910.02054; DeepSpeed's options: https://www.deepspeed.ai/docs/config-json

This is the one module that changes DeepSpeed (`sharded_loading`), for version 0.19.8; a test checks the argument.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from stages.contract.errors import UsageError
from stages.hardware.memory import ZERO3_LIVE, ZERO3_PREFETCH

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

UNDIVIDED_ELEMENTS = 100_000
"""ZeRO-3 keeps tensors of fewer elements whole on each GPU: norms and biases, a few MB of a 7B model. Gathering each of
them would take more time than the memory is worth."""


def deepspeed_config(dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration for a frozen base in `dtype`, with every option that affects memory or the result."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, and without an optimizer of no effect
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,  # fetch the next layer's weights while this one computes
            # a place of its own for each weight: in one buffer for several, all of them would be there twice
            "stage3_allgather_sequential": True,
            "memory_efficient_linear": False,  # would replace torch's function, also for models that are not sharded
            "stage3_max_live_parameters": ZERO3_LIVE,
            "stage3_max_reuse_distance": ZERO3_LIVE,
            "stage3_prefetch_bucket_size": ZERO3_PREFETCH,
            "stage3_param_persistence_threshold": UNDIVIDED_ELEMENTS,
        },
    }


def check_sharding(sharding: str, use_cpu: bool, quantisation: str | None) -> None:
    """Raise UsageError if the chosen sharding does not work with this base or on this machine.

    `quantisation` is the method that the base is quantised with, such as `gptq`; None if it is not quantised.
    """
    if sharding != "zero3":
        return
    if quantisation is not None:
        raise UsageError(
            f"train.sharding: zero3 cannot shard a base quantised with {quantisation}; set it to none or auto"
        )
    if use_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":  # DeepSpeed's own variable, for tests
        raise UsageError("train.sharding: zero3 needs a GPU, but there is none here; set it to none or auto")
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError("train.sharding: zero3 needs DeepSpeed, which is not installed here; set it to none or auto")


@contextmanager
def sharded_loading(dtype: str) -> Iterator[None]:
    """Within this context, transformers shards a model over the processes while it loads it. `dtype` is the model's.

    transformers calls `deepspeed.zero.Init` without its argument `tensor_overrides`, which is set here. While a model
    is built, DeepSpeed would convert every new tensor to the type of the weights, even one created in float32: rotary
    embeddings with frequencies in bfloat16 are wrong by whole turns after some thousand tokens. The weights do not need
    this conversion: transformers sets their type as torch's default.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    original = deepspeed.zero.Init
    only_the_device = frozenset({deepspeed.zero.DeepSpeedTensorOverride.device})
    config = HfDeepSpeedConfig(deepspeed_config(dtype))  # transformers shards while this object exists
    deepspeed.zero.Init = partial(original, tensor_overrides=only_the_device)
    try:
        yield
    finally:
        deepspeed.zero.Init = original
        del config


class ShardedBase:
    """A frozen model of transformers whose weights are sharded over the processes. Its head is gathered apart."""

    def __init__(self, model: Any, dtype: str) -> None:
        """Have DeepSpeed gather the weights of a model that was loaded in `sharded_loading`, without LoRA.

        A layer's weights are gathered at once: module by module takes most of the time, and LoRA's layers read weights
        outside of the modules that hold them. The embeddings' output gets a gradient, because DeepSpeed finds the end
        of a layer's backward pass by the gradient of its input.
        """
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module
        from torch import nn
        from transformers.modeling_layers import GradientCheckpointingLayer

        from stages.train.vision import decoder_layers, text_decoder

        class Pass(nn.Module):
            """DeepSpeed takes what lies within a call of this module as one pass."""

            def __init__(self) -> None:
                super().__init__()
                self.base = model.base_model

            def forward(self, compute: Callable[[], T]) -> T:
                """Do the work of a pass."""
                return compute()

        model.requires_grad_(False)
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.layers: list[nn.Module] = list(dict.fromkeys([*decoder_layers(text_decoder(model)), *blocks]))
        """Those of the language model and of a vision tower: a layer's weights are gathered together."""
        for layer in self.layers:
            set_z3_leaf_module(layer, True)
        self._pass = Pass()
        self._engine, *_ = deepspeed.initialize(model=self._pass, config=deepspeed_config(dtype))
        model.get_input_embeddings().register_forward_hook(lambda _module, _input, output: output.requires_grad_())

    def run(self, compute: Callable[[], T]) -> T:
        """Do the work of one pass over the model, forward. All processes must call this."""
        result: T = self._pass(compute)
        return result

    def release(self) -> None:
        """Free the whole weights that DeepSpeed keeps for a backward pass. Call it after a pass without one."""
        self._engine.optimizer.empty_partition_cache()

    def refuse_other_modules(self, model: Any) -> None:
        """Raise UsageError if a module outside of the layers has LoRA: its weight is not gathered for LoRA's layer."""
        from peft.tuners.lora import LoraLayer

        within = {id(module) for layer in self.layers for module in layer.modules()}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and id(module) not in within:
                raise UsageError(
                    f"train.target_modules: matches {name}, which is in no layer, and train.sharding zero3 gathers"
                    " whole layers; leave it out, or set train.sharding to none"
                )


def gathered(module: "torch.nn.Module") -> AbstractContextManager[None]:
    """A context in which a module's sharded weights are whole. All processes must enter it."""
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(module.parameters()))
    return context
