"""DeepSpeed's ZeRO for LoRA: what it is told, and what the model needs before it.

ZeRO-2 divides gradients and optimizer states among the GPUs, ZeRO-3 the frozen base too. With LoRA the first saves
little, for the base is what fills a card; the second lets a base train that no card could hold alone. Nothing is moved
to the processors' memory. ZeRO: https://arxiv.org/abs/1910.02054; the options: https://www.deepspeed.ai/docs/config-json
"""

import importlib.util
import os
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


def check_sharding(sharding: str, use_cpu: bool, stored_as: str | None) -> None:
    """Raise UsageError where DeepSpeed cannot work. `stored_as` is how the base's weights are quantised, or None."""
    if sharding == "none":
        return
    if sharding == "zero3" and stored_as is not None:
        raise UsageError(
            f"train.sharding is zero3, which cannot share out a base whose weights are {stored_as}'s; set it to zero2,"
            " none or auto"
        )
    if use_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":  # DeepSpeed's own variable; the tests set it
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


def gather_by_layer(model: "torch.nn.Module", whole_layers: bool) -> None:
    """Have ZeRO-3 gather and let go a layer's weights together. To be called before DeepSpeed has the model.

    By itself it does so for each module: thousands of small steps that take most of the time, and when a layer is
    computed again for its backward pass, its weights are gathered twice. A layer is what transformers never splits.

    `whole_layers` may be true only where what goes into every layer with trained weights asks for gradients, as with
    gradient checkpointing: else DeepSpeed takes a layer's backward pass for ended before it has begun, and it fails.
    """
    import torch
    from deepspeed.utils import set_z3_leaf_module

    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if whole_layers and type(module).__name__ in layers:
            set_z3_leaf_module(module, True)
        elif isinstance(module, torch.nn.Embedding) and not module.weight.requires_grad:
            # gradient checkpointing makes embeddings ask for gradients; DeepSpeed would gather the whole table for
            # them, with nothing to compute. It keeps what is there under this name
            module.pre_bwd_fn = _Untouched  # type: ignore[assignment]


class _Untouched:
    """In the place of an autograd function that gathers weights before a module's backward pass."""

    @staticmethod
    def apply(output: "torch.Tensor") -> "torch.Tensor":
        return output


def let_go_of_weights(model: "torch.nn.Module") -> None:
    """Free the weights that ZeRO-3 has left whole after a forward pass without a backward pass: the head and the last
    layers, kept for one. The next forward pass would have them beside its own."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for weight in model.parameters():
        status = getattr(weight, "ds_status", None)
        if status is ZeroParamStatus.AVAILABLE and not weight.ds_persist:  # type: ignore[attr-defined]
            weight.partition()  # type: ignore[attr-defined]


def mend_loading() -> None:
    """Have ZeRO-3 load a model with the same constants as it has everywhere else, and gather each weight into a place
    of its own. To be called before it is loaded.

    While a model is made, DeepSpeed rounds every new tensor to the type of the weights, also one asked for in float32:
    rotary embeddings, their frequencies rounded to bfloat16, are wrong by whole turns some thousand tokens on. The
    weights are of their type without that: transformers makes it torch's default while it loads. And weights gathered
    together lie in one buffer first, from which each is copied: all are there twice. The option against that,
    stage3_allgather_sequential, would turn fetching ahead off, too.
    """
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride, Init

    made = Init.__init__
    only_the_device = frozenset({DeepSpeedTensorOverride.device})

    def mended(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **{"tensor_overrides": only_the_device, **named})
        self.allgather_sequential = True

    Init.__init__ = mended
