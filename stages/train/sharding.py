"""DeepSpeed's ZeRO for LoRA: its configuration, and the changes that the model needs first.

ZeRO-2 divides gradients and optimizer states among the GPUs, ZeRO-3 the frozen base too. With LoRA, ZeRO-2 saves
little, because the base fills a GPU. ZeRO-3 trains a base that no GPU holds alone. Nothing is moved to the CPU's
memory. ZeRO: https://arxiv.org/abs/1910.02054; the options: https://www.deepspeed.ai/docs/config-json
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
"""Elements up to which ZeRO-3 does not divide a tensor: norms, biases and small LoRA weights, some 40 MB of a 7B model.
Gathering them one by one would cost more time than keeping them costs memory."""


def deepspeed_config(
    sharding: str, dtype: str, micro_batch: int, accumulation: int, max_grad_norm: float
) -> dict[str, Any]:
    """DeepSpeed's configuration. It sets every option that costs memory or changes the result.

    Optimizer and schedule are the trainer's own: torch's AdamW with the groups of LoRA+ and weight decay. None of
    DeepSpeed's kernels is compiled. With bfloat16 and float16, the model computes with LoRA weights of that type; the
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
        # as in torch's GradScaler, used without DeepSpeed: a checkpoint's loss scale means the same in both
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
    """Raise UsageError if DeepSpeed cannot work. `quantisation` names the base's, or is None."""
    if sharding == "none":
        return
    if sharding == "zero3" and quantisation is not None:
        raise UsageError(
            f"train.sharding is zero3, which cannot divide a base quantised with {quantisation}; set it to zero2,"
            " none or auto"
        )
    if use_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":  # DeepSpeed's own variable, for tests
        raise UsageError(f"train.sharding is {sharding}, but there is no GPU here; set it to none or auto")
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(f"train.sharding is {sharding}, but DeepSpeed is not installed here; set it to none or auto")


def convert_trainable_weights(dtype: str, model: "torch.nn.Module") -> None:
    """Convert the trainable weights to the type that the base computes in, which ZeRO requires.

    DeepSpeed converts them itself, except for a base that ZeRO-3 divided while loading: there, LoRA would stay and
    compute in float32.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def gather_by_layer(model: "torch.nn.Module", whole_layers: bool) -> None:
    """Make ZeRO-3 gather and release a layer's weights together. Call it before DeepSpeed gets the model.

    By default, ZeRO-3 does so for each module: thousands of small steps that take most of the time. When a layer is
    computed again for its backward pass, its weights are gathered twice. A layer is a module that transformers never
    splits.

    `whole_layers` may be true only if the input of every layer with trained weights requires gradients, as with
    gradient checkpointing. Otherwise DeepSpeed assumes the end of a layer's backward pass before its start, and fails.
    """
    import torch
    from deepspeed.utils import set_z3_leaf_module

    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if whole_layers and type(module).__name__ in layers:
            set_z3_leaf_module(module, True)
        elif isinstance(module, torch.nn.Embedding) and not module.weight.requires_grad:
            # gradient checkpointing makes embeddings require gradients, and DeepSpeed would gather the whole table with
            # nothing to compute. DeepSpeed does not replace an attribute of this name
            module.pre_bwd_fn = _NoGathering  # type: ignore[assignment]


class _NoGathering:
    """Replaces DeepSpeed's autograd function that gathers weights before a module's backward pass."""

    @staticmethod
    def apply(output: "torch.Tensor") -> "torch.Tensor":
        return output


def free_whole_weights(model: "torch.nn.Module") -> None:
    """Free the weights that ZeRO-3 keeps whole after a forward pass: the head and the last layers, for a backward pass.
    In an evaluation there is none, and the next forward pass would hold them beside its own."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for weight in model.parameters():
        status = getattr(weight, "ds_status", None)
        if status is ZeroParamStatus.AVAILABLE and not weight.ds_persist:  # type: ignore[attr-defined]
            weight.partition()  # type: ignore[attr-defined]


def fix_zero3_loading() -> None:
    """Make ZeRO-3 load a model with unrounded constants, and gather each weight into its own memory. Call it before the
    model is loaded.

    While a model is built, DeepSpeed converts every new tensor to the type of the weights, even one created in float32.
    Rotary embeddings whose frequencies are rounded to bfloat16 are wrong by whole turns after some thousand tokens. The
    weights get their type without that: transformers makes it torch's default while loading. DeepSpeed also gathers
    several weights into one buffer and copies each from there, so that all exist twice. Its option against that,
    stage3_allgather_sequential, would also turn off prefetching.
    """
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride, Init

    made = Init.__init__
    only_the_device = frozenset({DeepSpeedTensorOverride.device})

    def mended(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **{"tensor_overrides": only_the_device, **named})
        self.allgather_sequential = True

    Init.__init__ = mended
