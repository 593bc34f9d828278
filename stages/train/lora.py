"""LoRA's layers for training: the base's product and the adapter's in one autograd function.

PEFT decides which modules get LoRA, makes its weights, and writes the adapter. `fuse` then puts a `LoraLinear` in the
place of each of PEFT's layers; the weights stay the same objects under the same names. Compared with PEFT's layer, a
`LoraLinear` keeps its input once for the backward pass, shares it between the modules that read it (query, key and
value; gate and up), and computes LoRA's products in the base's type with float32 weights. LoRA: arXiv:2106.09685.
"""

import importlib.metadata
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from stages.train.dropout import Dropout
from stages.train.frozen import base_gradient, base_product

ADAPTER = "default"
"""PEFT's name of the adapter that is trained."""

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of neighbouring modules that read the same input in the models that transformers knows. It is checked at each
call: a module that gets another input computes on its own."""


@dataclass
class Pass:
    """What the layers of one model share in a pass."""

    dropout: Dropout | None = None
    """Dropout on the inputs of LoRA; None: nothing is dropped, as in validation."""


class LoraLinear(nn.Module):
    """A linear module of the base with LoRA."""

    def __init__(self, layer: LoraLayer, shared: Pass, salt: int) -> None:
        """Take over the weights of PEFT's layer. `salt` is a number of this module's own, for its dropout."""
        super().__init__()
        self.base_layer = layer.get_base_layer()
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.scale = float(layer.scaling[ADAPTER])
        self.salt = salt
        self._pass = shared
        self._group: _Group | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models read its type."""
        base: Any = self.base_layer
        weight: torch.Tensor = base.weight
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        base: Any = self.base_layer
        bias: torch.Tensor | None = base.bias
        return bias

    @property
    def a(self) -> torch.Tensor:
        """LoRA's A, [rank, inputs], float32."""
        layer: Any = self.lora_A[ADAPTER]
        weight: torch.Tensor = layer.weight
        return weight

    @property
    def b(self) -> torch.Tensor:
        """LoRA's B, [outputs, rank], float32."""
        layer: Any = self.lora_B[ADAPTER]
        weight: torch.Tensor = layer.weight
        return weight

    def hide_weights(self) -> None:
        """Take LoRA's weights out of the model's parameters: DeepSpeed would shard them with their layer."""
        hidden = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        del self.lora_A, self.lora_B
        vars(self).update(hidden)

    def join(self, group: "_Group") -> None:
        """Compute together with the other modules of `group`, which read the same input."""
        self._group = group
        self.salt = group.salt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base's output plus LoRA's; shape [..., outputs] for an input of [..., inputs]."""
        if self._group is not None:
            return self._group.output(self, x)
        (output,) = products(x, [self], self._pass.dropout)
        return output


class _Group:
    """Modules that read the same input, one after the other. The first computes for all."""

    def __init__(self, members: list[LoraLinear], shared: Pass) -> None:
        self._members, self._pass = members, shared
        self.salt = members[0].salt
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def output(self, member: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        """The output of one member for `x`."""
        if self._input is not x or id(member) not in self._outputs:
            if member is not self._members[0]:
                (output,) = products(x, [member], self._pass.dropout)
                return output
            self._input = x
            outputs = products(x, self._members, self._pass.dropout)
            self._outputs = {id(one): output for one, output in zip(self._members, outputs, strict=True)}
        output = self._outputs.pop(id(member))
        if not self._outputs:
            self._input = None
        return output


def fuse(model: nn.Module, shared: Pass) -> None:
    """Put a LoraLinear in the place of each of PEFT's LoRA layers, in place.

    `shared` is what the layers read in each pass.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for number, (name, layer) in enumerate(layers):
        put_module(model, name, LoraLinear(layer, shared, salt=number * 40503))
    for parent in model.modules():
        for names in SHARED_INPUT:
            members = [getattr(parent, name, None) for name in names]
            fused = [member for member in members if isinstance(member, LoraLinear)]
            if len(fused) == len(names):
                group = _Group(fused, shared)
                for member in fused:
                    member.join(group)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with this name. torch has `set_submodule` for it from version 2.5 on."""
    parent, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(parent), own_name, module)


def products(x: torch.Tensor, members: list[LoraLinear], dropout: Dropout | None) -> tuple[torch.Tensor, ...]:
    """The outputs of modules that read the same input `x`, of shape [..., inputs]; each of shape [..., outputs]."""
    outputs = _Products.apply(
        x,
        [one.base_layer for one in members],
        [one.scale for one in members],
        dropout and dropout.for_rows(x[..., 0].numel()),
        members[0].salt,
        *(one.a for one in members),
        *(one.b for one in members),
    )
    # viewed here: a model such as OLMo changes them in place, which no view that a function returns allows
    return tuple(output.view(*x.shape[:-1], -1) for output in outputs)


def has_kernels(device: torch.device) -> bool:
    """Whether training on a device uses the kernels in `kernels.py`: on a GPU, with Triton from version 3 on."""
    return device.type == "cuda" and triton_version() >= 3


@cache
def triton_version() -> int:
    """The first number of Triton's version; 0 without Triton. The image v100-gptq has 2, which cannot compile all."""
    try:
        return int(importlib.metadata.version("triton").partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


def stacked(parts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """Matrices A of LoRA in one, [all ranks, inputs]; on a GPU with rows of zeros, as its kernels need."""
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    if not has_kernels(whole.device):
        return whole.to(dtype)
    from stages.train.kernels import padded_rank

    return functional.pad(whole.to(dtype), (0, 0, 0, padded_rank(len(whole)) - len(whole)))


def inner_product(x: torch.Tensor, a: torch.Tensor, dropout: Dropout | None, salt: int) -> torch.Tensor:
    """(dropped x) A', [tokens, ranks], for x [tokens, inputs] and A [ranks, inputs]."""
    if dropout is None:
        return x @ a.t()
    if not has_kernels(x.device):
        return dropout.apply(x, salt) @ a.t()
    from stages.train.kernels import dropped_product

    return dropped_product(x, a, dropout, salt)


def add_inner_gradient(
    d_x: torch.Tensor | None,
    d_inner: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    dropout: Dropout | None,
    salt: int,
) -> torch.Tensor:
    """Add the gradient of x in `inner_product` to `d_x`, in place, unless that is None. Returns the gradient of A in
    float32. The dropout's mask is made again."""
    if dropout is None:
        if d_x is not None:
            d_x.addmm_(d_inner, a)
        return (d_inner.t() @ x).float()
    if not has_kernels(x.device):
        keep = dropout.keep(salt, x.shape[1]) * dropout.upscale
        if d_x is not None:
            d_x += (d_inner @ a) * keep
        return (d_inner.t() @ (x * keep)).float()
    from stages.train.kernels import add_dropped, dropped_outer

    if d_x is not None:
        add_dropped(d_x, d_inner, a, dropout, salt)
    return dropped_outer(x, d_inner, dropout, salt)


class _Products(torch.autograd.Function):
    """y_i = layer_i(x) + s_i (dropped x) A_i' B_i' for layers i that read the same x. The layers are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: list[nn.Module],
        scales: list[float],
        dropout: Dropout | None,
        salt: int,
        *lora: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Compute the outputs, [tokens, outputs] each. `lora`: all A, then all B."""
        a_parts, b_parts = lora[: len(layers)], lora[len(layers) :]
        flat = x.flatten(0, -2)
        a = stacked(a_parts, x.dtype)
        inner = inner_product(flat, a, dropout, salt)
        b = [(part * scale).to(x.dtype) for part, scale in zip(b_parts, scales, strict=True)]
        outputs, first = [], 0
        for layer, part in zip(layers, b, strict=True):
            output = base_product(layer, flat)
            output.addmm_(inner[:, first : first + part.shape[1]], part.t())
            outputs.append(output)
            first += part.shape[1]
        ctx.save_for_backward(flat, a, inner, *b)
        ctx.shape, ctx.layers, ctx.scales, ctx.dropout, ctx.salt = x.shape, layers, scales, dropout, salt
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """The gradients of x, of all A and of all B."""
        flat, a, inner, *b = ctx.saved_tensors
        ranks = [part.shape[1] for part in b]
        d_inner = torch.zeros_like(inner)
        d_b, d_x, first = [], None, 0
        for layer, part, scale, gradient in zip(ctx.layers, b, ctx.scales, gradients, strict=True):
            d_output, columns = gradient.flatten(0, -2), slice(first, first + part.shape[1])
            torch.mm(d_output, part, out=d_inner[:, columns])
            d_b.append((d_output.t() @ inner[:, columns]).float() * scale)
            if ctx.needs_input_grad[0]:
                d_x = base_gradient(layer, d_output, into=d_x)
            first = columns.stop
        d_a = add_inner_gradient(d_x, d_inner, flat, a, ctx.dropout, ctx.salt)[: sum(ranks)]
        d_x = None if d_x is None else d_x.view(ctx.shape)
        return d_x, None, None, None, None, *d_a.split(ranks), *d_b
