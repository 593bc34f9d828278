"""DeepSpeed's ZeRO for LoRA: what it is told, and what the model needs before it.

ZeRO-2 divides gradients and optimizer states among the GPUs, ZeRO-3 the frozen base too. With LoRA the first saves
little, for the base is what fills a card; the second lets a base train that no card could hold alone. Nothing is moved
to the processors' memory. ZeRO: https://arxiv.org/abs/1910.02054; the options: https://www.deepspeed.ai/docs/config-json
"""

import importlib.util
from functools import partialmethod
from typing import TYPE_CHECKING, Any

from stages.contract.errors import UsageError
from stages.hardware.memory import ZERO3_LIVE, ZERO3_PREFETCH, ZERO_BUCKET

if TYPE_CHECKING:
    import torch

STAGES = {"zero2": 2, "zero3": 3}

KEPT_WHOLE = 100_000
"""ZeRO-3: a tensor up to this size is not divided: norms, biases and small LoRA weights, some 40 MB of a 7B model. To
gather them one by one would cost more time than they cost memory."""


def deepspeed_config(
    sharding: str, dtype: str, micro_batch: int, accumulation: int, max_grad_norm: float
) -> dict[str, Any]:
    """DeepSpeed's configuration, with nothing left to its defaults that costs memory or changes the result.

    The optimizer is the trainer's own torch AdamW, with the groups of LoRA+ and weight decay, and so is the schedule:
    none of DeepSpeed's kernels is compiled. With bfloat16 and float16 the model computes with LoRA weights of that
    type, and the optimizer keeps them in float32, where it sums the gradients too.
    """
    zero: dict[str, Any] = {
        "stage": STAGES[sharding],
        "contiguous_gradients": True,
        "reduce_bucket_size": ZERO_BUCKET,
        "allgather_bucket_size": ZERO_BUCKET,
        "overlap_comm": False,  # LoRA's gradients are small: a second buffer is not worth its memory
    }
    if sharding == "zero3":
        zero |= {
            "overlap_comm": True,  # the next layer's weights come while this one computes
            "stage3_max_live_parameters": ZERO3_LIVE,
            "stage3_max_reuse_distance": ZERO3_LIVE,
            "stage3_prefetch_bucket_size": ZERO3_PREFETCH,
            "stage3_param_persistence_threshold": KEPT_WHOLE,
        }
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        # as torch's GradScaler, which trains without DeepSpeed, so that a checkpoint's scale means the same in both
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


def check_sharding(sharding: str, use_cpu: bool) -> None:
    """Raise UsageError where DeepSpeed cannot work."""
    if sharding == "none":
        return
    if use_cpu:
        raise UsageError(f"train.sharding is {sharding}, but there is no GPU here; set it to none or auto")
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(f"train.sharding is {sharding}, but DeepSpeed is not installed here; set it to none or auto")


def compute_in(dtype: str, model: "torch.nn.Module") -> None:
    """Give the trainable weights the type that the base computes in, as ZeRO wants them.

    DeepSpeed does that itself but for a base that ZeRO-3 has divided while loading: there float32 LoRA weights would
    stay, and be computed with in float32.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def keep_constants_exact() -> None:
    """Have ZeRO-3 load a model with the same constants as it has everywhere else. To be called before it is loaded.

    While a model is made, DeepSpeed rounds every new tensor to the type of the weights, also one asked for in float32:
    rotary embeddings, their frequencies rounded to bfloat16, are wrong by whole turns some thousand tokens on. The
    weights are of their type without that: transformers makes it torch's default while it loads.
    """
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride, Init

    only_the_device = frozenset({DeepSpeedTensorOverride.device})
    Init.__init__ = partialmethod(Init.__init__, tensor_overrides=only_the_device)
