"""The base's linear layers, which training does not change: their product, and the gradient of its input.

A layer in 4 bits is unpacked twice for each pass, in the forward and in the backward pass, and its unpacked weight is
kept in neither.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def base_product(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a linear layer, with its bias, for x [tokens, inputs]. Call it where autograd records nothing."""
    if type(layer) is nn.Linear:
        return functional.linear(x, layer.weight, layer.bias)
    if not _can_unpack(layer):
        output: torch.Tensor = layer(x)
        return output.to(x.dtype)
    # what is kept gets its memory before what is not: the other way around, unpacked weights leave gaps
    product = x.new_empty(len(x), outputs_of(layer))
    weight = unpacked_weight(layer, x.dtype)
    bias: Any = layer.bias  # in float16 in a GPTQ base, whatever the model computes in
    if bias is None:
        return torch.mm(x, weight.t(), out=product)
    return torch.addmm(bias.to(x.dtype), x, weight.t(), out=product)


def base_gradient(layer: nn.Module, d_output: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    """The gradient of a linear layer's input, [tokens, inputs], for that of its output; added to `into`, in place, if
    there is one."""
    if not _can_unpack(layer):
        found = _by_autograd(layer, d_output)
        return found if into is None else into.add_(found)
    if into is not None:
        return into.addmm_(d_output, unpacked_weight(layer, d_output.dtype))
    if type(layer) is nn.Linear:
        return d_output @ layer.weight
    gradient = d_output.new_empty(len(d_output), inputs_of(layer))
    return torch.mm(d_output, unpacked_weight(layer, d_output.dtype), out=gradient)


def _can_unpack(layer: Any) -> bool:
    """Whether `unpacked_weight` knows how to unpack a linear layer."""
    if type(layer) is nn.Linear or hasattr(layer, "dequantize_weight"):
        return True
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def unpacked_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a linear layer for which `_can_unpack` is true, [outputs, inputs], in `dtype`."""
    if type(layer) is nn.Linear:
        return layer.weight
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is not None:  # bitsandbytes' Linear4bit
        from bitsandbytes.functional import dequantize_4bit

        weight: torch.Tensor = dequantize_4bit(layer.weight.data, state).to(dtype)
        return weight
    # gptqmodel's layers; [inputs, outputs]
    if layer.qweight.is_cuda and layer.bits in (2, 4, 8):
        # in training they would unpack with torch, in some ten kernels
        from gptqmodel.nn_modules.triton_utils.dequant import dequant

        packed = layer.qweight, layer.scales, layer.qzeros, layer.g_idx
        unpacked: torch.Tensor = dequant(dtype, *packed, layer.bits, layer.pack_dtype_bits, layer.maxq)
    else:
        unpacked = layer.dequantize_weight().to(dtype)
    return unpacked.t()


def _by_autograd(layer: Any, d_output: torch.Tensor) -> torch.Tensor:
    """The gradient of a layer's input as its own library computes it. The layer is linear, so any input does."""
    with torch.enable_grad():
        x = torch.zeros(len(d_output), inputs_of(layer), device=d_output.device, dtype=d_output.dtype)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x), x, d_output)
    return gradient


def is_linear(layer: nn.Module) -> bool:
    """Whether a module is a linear layer, of torch or of a library for fewer bits."""
    return any(hasattr(layer, f"in{name}") and hasattr(layer, f"out{name}") for name in ("_features", "features"))


def inputs_of(layer: Any) -> int:
    """Number of inputs of a linear layer; auto-gptq names it `infeatures`."""
    return int(getattr(layer, "in_features", None) or layer.infeatures)


def outputs_of(layer: Any) -> int:
    """Number of outputs of a linear layer, as `inputs_of`."""
    return int(getattr(layer, "out_features", None) or layer.outfeatures)


def has_bias(layer: Any) -> bool:
    """Whether a linear layer adds a bias."""
    return getattr(layer, "bias", None) is not None
