"""DeepSpeed's ZeRO for LoRA: its configuration, and what has to be changed in the model first.

ZeRO-2 shards gradients and optimizer states over the GPUs. ZeRO-3 also shards the frozen base. With LoRA, ZeRO-2 saves
little, because most of the memory holds the base. ZeRO-3 can train a base that is too large for one GPU. Lorry
offloads nothing to the CPU's memory. ZeRO: https://arxiv.org/abs/1910.02054; DeepSpeed's options:
https://www.deepspeed.ai/docs/config-json
"""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from stages.contract.errors import UsageError
from stages.hardware.memory import ZERO3_LIVE, ZERO3_PREFETCH, ZERO_BUCKET

if TYPE_CHECKING:
    import torch

STAGES = {"zero2": 2, "zero3": 3}

UNDIVIDED_ELEMENTS = 100_000
"""ZeRO-3 keeps tensors of fewer elements whole on each GPU: norms, biases and small LoRA weights, some 40 MB of a 7B
model. Gathering each of them would take more time than the memory is worth."""


def deepspeed_config(
    sharding: str, dtype: str, micro_batch: int, accumulation: int, max_grad_norm: float
) -> dict[str, Any]:
    """DeepSpeed's configuration, with every option that affects memory or the result. `sharding` is `zero2` or `zero3`.

    Optimizer and schedule are the trainer's own: torch's AdamW with the groups of LoRA+ and weight decay. DeepSpeed
    compiles none of its kernels. With bfloat16 and float16, the model computes with LoRA weights of that type; the
    optimizer keeps the weights and sums the gradients in float32.
    """
    zero: dict[str, Any] = {
        "stage": STAGES[sharding],
        "contiguous_gradients": True,
        "reduce_bucket_size": ZERO_BUCKET,
        "allgather_bucket_size": ZERO_BUCKET,
        "overlap_comm": False,  # LoRA's gradients are small and not worth the memory of a second buffer
    }
    if sharding == "zero3":
        zero |= {
            "overlap_comm": True,  # fetch the next layer's weights while this one computes
            "stage3_max_live_parameters": ZERO3_LIVE,
            "stage3_max_reuse_distance": ZERO3_LIVE,
            "stage3_prefetch_bucket_size": ZERO3_PREFETCH,
            "stage3_param_persistence_threshold": UNDIVIDED_ELEMENTS,
        }
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        # the values of torch's GradScaler, used without DeepSpeed: both must read a checkpoint's loss scale alike
        "fp16": {
            "enabled": dtype == "float16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 2000,
            "hysteresis": 1,
            "min_loss_scale": 1,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }


def check_sharding(sharding: str, use_cpu: bool, quantisation: str | None) -> None:
    """Raise UsageError if the chosen sharding does not work with this base or on this machine.

    `quantisation` is the method that the base is quantised with, such as `gptq`; None if it is not quantised.
    """
    if sharding == "none":
        return
    if sharding == "zero3" and quantisation is not None:
        raise UsageError(
            f"train.sharding: zero3 cannot shard a base quantised with {quantisation}; set it to zero2, none or auto"
        )
    if use_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":  # DeepSpeed's own variable, for tests
        raise UsageError(f"train.sharding: {sharding} needs a GPU, but there is none here; set it to none or auto")
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            f"train.sharding: {sharding} needs DeepSpeed, which is not installed here; set it to none or auto"
        )


def convert_trainable_weights(dtype: str, model: "torch.nn.Module") -> None:
    """Convert a model's trainable weights to `dtype`, the type that the base computes in. ZeRO requires this.

    DeepSpeed converts them itself unless ZeRO-3 sharded the base while it was loaded. In that case, LoRA would compute
    in float32 without this function.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def gather_by_layer(model: "torch.nn.Module", whole_layers: bool) -> None:
    """Keep ZeRO-3 from gathering frozen embeddings for a backward pass. With `whole_layers`, also make it gather all
    weights of a layer at once.

    Call it before DeepSpeed gets the model. By default, ZeRO-3 gathers the weights of each module separately. These
    thousands of small steps take most of the time, and with gradient checkpointing the weights are gathered twice. A
    layer is a module that transformers never splits over GPUs (`_no_split_modules`).

    Set `whole_layers` only if the input of every layer with trained weights requires gradients, as it does with
    gradient checkpointing. Otherwise DeepSpeed considers a layer's backward pass finished before it starts, and fails.
    """
    import torch
    from deepspeed.utils import set_z3_leaf_module

    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if whole_layers and type(module).__name__ in layers:
            set_z3_leaf_module(module, True)
        elif isinstance(module, torch.nn.Embedding) and not module.weight.requires_grad:
            # gradient checkpointing makes the embeddings' output require gradients, so DeepSpeed would gather the whole
            # table for a backward pass that computes nothing. It does not replace an attribute that exists
            module.pre_bwd_fn = _NoGathering  # type: ignore[assignment]


class _NoGathering:
    """Replaces DeepSpeed's autograd function that gathers weights before a module's backward pass."""

    @staticmethod
    def apply(output: "torch.Tensor") -> "torch.Tensor":
        """Return the output unchanged."""
        return output


def free_whole_weights(model: "torch.nn.Module") -> None:
    """Free the whole weights that ZeRO-3 keeps after a forward pass. Call it after each batch of an evaluation.

    ZeRO-3 keeps the head and the last layers for the backward pass. An evaluation has no backward pass, so the next
    forward pass would need memory for these weights and its own.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for weight in model.parameters():
        status = getattr(weight, "ds_status", None)
        if status is ZeroParamStatus.AVAILABLE and not weight.ds_persist:  # type: ignore[attr-defined]
            weight.partition()  # type: ignore[attr-defined]


def fix_zero3_loading() -> None:
    """Patch ZeRO-3 to keep float32 constants while a model loads, and to gather each weight into its own memory. Call
    it before the model is loaded.

    While a model is built, DeepSpeed converts every new tensor to the type of the weights, even one created in float32.
    Rotary embeddings with frequencies in bfloat16 are wrong by whole turns after some thousand tokens. The weights do
    not need this conversion: transformers sets their type as torch's default while loading.

    DeepSpeed also gathers several weights into one buffer and then copies each, so that all of them exist twice. Its
    option stage3_allgather_sequential avoids that but also turns off prefetching.
    """
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride, Init

    original = Init.__init__
    only_the_device = frozenset({DeepSpeedTensorOverride.device})

    def patched_init(self: Any, *arguments: Any, **named: Any) -> None:
        """Call DeepSpeed's `Init.__init__` with the two settings changed."""
        original(self, *arguments, **{"tensor_overrides": only_the_device, **named})
        self.allgather_sequential = True

    Init.__init__ = patched_init
