"""Modules for a GPU that take the place of a model's own: fewer kernels and less memory, the same numbers.

Each is put in only where it gives what the model's own module gives for a random input, so no list of model families is
needed. `apply_rotary_pos_emb` is a function of each of transformers' modelling modules and no module of the model;
`fuse_elementwise` replaces it there. It is the one name of transformers that Lorry overwrites
(tests/train/test_fused.py checks that it is there, for transformers 4.57 to 5.19).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from stages.train.dropout import Dropout
from stages.train.frozen import base_gradient, base_product, has_bias, inputs_of
from stages.train.kernels import RmsNorm, Rotate, swiglu, swiglu_backward
from stages.train.lora import LoraLinear, Pass, add_inner_gradient, inner_product, put_module, stacked

TRIED = 32
"""Tokens of the random input that a module is tried with."""


def fuse_elementwise(model: nn.Module, shared: Pass) -> None:
    """Replace a model's norms, gated MLPs and rotations by fused ones, in place, wherever they are the same function.

    `shared` is what the layers read in each pass. Call it when LoRA's layers are `LoraLinear`s, on a GPU.
    """
    # a layer in 4 bits has whole numbers as weights
    frozen = (weight for weight in model.parameters() if not weight.requires_grad and weight.is_floating_point())
    dtype = next(frozen).dtype
    for name, module in list(model.named_modules()):
        for made in (_fused_norm(module), _fused_mlp(module, shared)):
            if made is not None and _is_same(module, made, _inputs_of(module), dtype):
                put_module(model, name, made)
    for module in {type(layer).__module__ for layer in model.modules() if hasattr(layer, "q_proj")}:
        _fuse_rotation(sys.modules[module])


def _inputs_of(module: nn.Module) -> int:
    """Number of features of a norm's or an MLP's input."""
    gate = getattr(module, "gate_proj", None)
    weight: Any = module.weight if gate is None else None
    return inputs_of(gate.base_layer) if gate is not None else len(weight)


@torch.no_grad()
def _is_same(module: nn.Module, other: nn.Module, features: int, dtype: torch.dtype) -> bool:
    """Whether two modules give the same output for a random input."""
    weight = next(module.parameters())
    x = torch.randn(1, TRIED, features, device=weight.device, dtype=dtype)
    wanted, found = module(x), other(x)
    return bool((found - wanted).norm() < 0.01 * wanted.norm())


# -- norms -------------------------------------------------------------------------------------------------------


class FusedNorm(nn.Module):
    """RMSNorm in one kernel."""

    def __init__(self, weight: nn.Parameter, epsilon: float, offset: float) -> None:
        """`offset` is added to the weight: 1 in Gemma, else 0."""
        super().__init__()
        self.weight, self._epsilon, self._offset = weight, epsilon, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., features] divided by its root mean square, times the weight."""
        output: torch.Tensor = RmsNorm.apply(x, self.weight, self._epsilon, self._offset)
        return output


def _fused_norm(module: nn.Module) -> FusedNorm | None:
    """The fused form of a norm; None if the module is none, or its weight is trained."""
    if "RMSNorm" not in type(module).__name__ or getattr(module, "weight", None) is None or list(module.children()):
        return None
    weight: Any = module.weight
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if epsilon is None or weight.requires_grad or weight.dim() != 1:
        return None
    plain, gemma = (FusedNorm(weight, float(epsilon), offset) for offset in (0.0, 1.0))
    return plain if _is_same(module, plain, len(weight), weight.dtype) else gemma


# -- gated MLPs --------------------------------------------------------------------------------------------------


class FusedMlp(nn.Module):
    """A SwiGLU MLP with LoRA on its three projections, in one autograd function."""

    def __init__(self, gate: LoraLinear, up: LoraLinear, down: LoraLinear, shared: Pass) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self._pass = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """down(silu(gate(x)) * up(x)), for x [..., features]."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        layers = [one.base_layer for one in (gate, up, down)]
        lora = [*(one.a for one in (gate, up, down)), *(one.b for one in (gate, up, down))]
        scales = (gate.scale, up.scale, down.scale)
        output: torch.Tensor = _Mlp.apply(x, layers, scales, self._pass.dropout, (gate.salt, down.salt), *lora)
        return output


def _fused_mlp(module: nn.Module, shared: Pass) -> FusedMlp | None:
    """The fused form of an MLP; None if the module is none with LoRA on three projections without biases."""
    members = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    found = [one for one in members if isinstance(one, LoraLinear) and not has_bias(one.base_layer)]
    if len(found) < 3:
        return None
    return FusedMlp(found[0], found[1], found[2], shared)


class _Mlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) with LoRA. Keeps the base's products of gate and up; LoRA's part is added on the way
    through memory, and the down projection's input is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: list[nn.Module],
        scales: tuple[float, float, float],
        dropout: Dropout | None,
        salts: tuple[int, int],
        *lora: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the output. `layers` are gate, up and down, `lora` their three A and their three B."""
        a_gate, a_up, a_down, b_gate, b_up, b_down = lora
        flat, dtype = x.flatten(0, -2), x.dtype
        ranks = len(a_gate), len(a_up)
        a = stacked((a_gate, a_up), dtype)
        # each B over all ranks of the stacked A, so that one product serves both
        b_1 = functional.pad(b_gate * scales[0], (0, len(a) - ranks[0])).to(dtype)
        b_2 = functional.pad(b_up * scales[1], (ranks[0], len(a) - sum(ranks))).to(dtype)
        inner = inner_product(flat, a, dropout, salts[0])
        gate, up = base_product(layers[0], flat), base_product(layers[1], flat)
        hidden = swiglu(gate, up, inner, b_1, b_2)
        a_3, b_3 = stacked((a_down,), dtype), (b_down * scales[2]).to(dtype)
        inner_down = inner_product(hidden, a_3, dropout, salts[1])
        output = base_product(layers[2], hidden)
        output.addmm_(inner_down[:, : len(a_down)], b_3.t())
        ctx.save_for_backward(flat, gate, up, inner, inner_down, a, b_1, b_2, a_3, b_3)
        ctx.more = x.shape, layers, scales, dropout, salts, ranks, len(a_down)
        return output.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """The gradients of x and of the three A and B. Writes over `gate` and `up`, so it can run once."""
        flat, gate, up, inner, inner_down, a, b_1, b_2, a_3, b_3 = ctx.saved_tensors
        shape, layers, scales, dropout, salts, ranks, down_rank = ctx.more
        d_output = gradients[0].flatten(0, -2)
        d_down = torch.zeros_like(inner_down)
        torch.mm(d_output, b_3, out=d_down[:, :down_rank])
        d_b_down = (d_output.t() @ inner_down[:, :down_rank]).float() * scales[2]
        hidden = base_gradient(layers[2], d_output)
        swiglu_backward(gate, up, inner, b_1, b_2, hidden, d_down, a_3, dropout, salts[1])
        d_a_down = add_inner_gradient(None, d_down, hidden, a_3, dropout, salts[1])[:down_rank]
        d_inner = gate @ b_1
        d_inner.addmm_(up, b_2)
        d_b_gate = (gate.t() @ inner[:, : ranks[0]]).float() * scales[0]
        d_b_up = (up.t() @ inner[:, ranks[0] : sum(ranks)]).float() * scales[1]
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = base_gradient(layers[0], gate)
            d_x = base_gradient(layers[1], up, into=d_x)
        d_a = add_inner_gradient(d_x, d_inner, flat, a, dropout, salts[0])
        d_a_gate, d_a_up = d_a[: ranks[0]], d_a[ranks[0] : sum(ranks)]
        d_x = None if d_x is None else d_x.view(shape)
        return d_x, None, None, None, None, d_a_gate, d_a_up, d_a_down, d_b_gate, d_b_up, d_b_down


# -- rotations ---------------------------------------------------------------------------------------------------

ROTATION = "apply_rotary_pos_emb"


def _fuse_rotation(modelling: Any) -> None:
    """Replace the function that rotates queries and keys in one of transformers' modules, if it is the usual one."""
    original: Callable[..., Any] | None = getattr(modelling, ROTATION, None)
    if original is None or isinstance(original, _Rotation):
        return
    angles = torch.rand(1, TRIED, 8, device="cuda").repeat(1, 1, 2)
    query, key = (torch.randn(1, 2, TRIED, 16, device="cuda") for _ in range(2))
    fused = _Rotation(original)
    try:
        wanted, found = (rotate(query, key, angles.cos(), angles.sin()) for rotate in (original, fused))
        same = all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, wanted, strict=True))
    except (TypeError, ValueError, RuntimeError):  # of another form
        return
    if same:
        setattr(modelling, ROTATION, fused)


class _Rotation:
    """Rotary position embedding in one kernel for queries and one for keys."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotated queries and keys, [1, heads, tokens, size]; by the original where only part of them turns."""
        if more or named or cos.shape != (1, q.shape[2], q.shape[3]) or len(q) > 1 or not q.is_cuda:
            rotated: tuple[torch.Tensor, torch.Tensor] = self._original(q, k, cos, sin, *more, **named)
            return rotated
        return Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)
