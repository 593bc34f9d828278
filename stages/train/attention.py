"""Attention over a pass: sequences one after the other, none of which sees another.

transformers calls `Attention.attend` for each layer of the language model, once `use_packed_attention` has chosen it.
It gets the sequences' boundaries as the keyword `cu_seq_lens_q`, as transformers' own FlashAttention does. A function
that ignored a model's window, cap, scale or sinks would give wrong numbers without an error: what a kernel does not
know is computed sequence by sequence, in plain torch.

FlashAttention's backward pass adds up the gradient of the queries in an order of chance unless it is asked not to.
Lorry asks, so that a training that was stopped ends in the same bits as one that was not.

Kernels, the fastest first:

* flash-attn-4: FlashAttention for Hopper and newer, in CuTe (https://github.com/Dao-AILab/flash-attention)
* flash-attn: FlashAttention 2 (arXiv:2307.08691), from compute capability 8.0, where an image has the package
* varlen: FlashAttention 2 as torch ships it (torch.nn.attention.varlen)
* efficient: torch's memory-efficient kernel (arXiv:2112.05682) with cumulative lengths, for a V100
* plain: torch's scaled_dot_product_attention for each sequence, for a CPU
"""

import importlib.util
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "lorry"
"""Name of this attention in transformers' tables."""

PLAIN = "plain"

Kernel = Callable[..., torch.Tensor]
"""(query [tokens, heads, size], key and value [tokens, key heads, size], boundaries [sequences + 1] in int32, length of
the longest sequence, scale, window or None) -> output as query. Causal."""


def use_packed_attention(model: Any, kernel: str = PLAIN) -> "Attention":
    """Have a model's language part attend within sequences only. A vision tower keeps its own attention.

    `kernel` is a name that `choose_kernel` returned. Returns the attention that the model has from now on.
    """
    attention = Attention(kernel)
    AttentionInterface.register(NAME, attention.attend)
    AttentionMaskInterface.register(NAME, attention.make_no_mask)
    text = model.config.get_text_config()
    if text is model.config:
        model.set_attn_implementation(NAME)
        return attention
    part = next(name for name in model.config.sub_configs if getattr(model.config, name) is text)
    model.set_attn_implementation({part: NAME})
    return attention


def own_attention(config: Any) -> str:
    """transformers' name of the attention of its own that computes all that a model's config asks for.

    `sdpa` ignores a cap on scores without an error, and transformers refuses it for gpt-oss, which has sinks.
    """
    text = config.get_text_config()
    return "eager" if getattr(text, "attn_logit_softcapping", None) or text.model_type == "gpt_oss" else "sdpa"


class Attention:
    """Attention with one kernel."""

    def __init__(self, kernel: str) -> None:
        self._kernel = KERNELS[kernel] if kernel != PLAIN else None
        self._knows_windows = kernel not in WITHOUT_WINDOW
        self._has_torchs_order = kernel in ORDERED_BY_TORCH
        self.without_kernel: set[str] = set()
        """What the kernel does not know and is computed in plain torch, of what the model asked for so far."""
        self._windows: set[int | None] = set()
        self._windows_of_masks: set[int | None] = set()

    @property
    def lost_windows(self) -> set[int]:
        """Lengths of windows or chunks that the model has only in its masks, which `attend` does not get. A config
        without windows may say 0."""
        return {window for window in self._windows_of_masks - self._windows if window}

    def make_no_mask(self, *_: Any, local_size: int | None = None, **__: Any) -> None:
        """In place of a mask: `attend` knows the boundaries. `local_size` is the window or chunk of the mask."""
        self._windows_of_masks.add(local_size)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        is_causal: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Causal attention within each sequence; the interface of transformers' attention functions.

        Shapes: `query` [1, heads, tokens, size], `key` and `value` [1, key heads, tokens, size]; the result [1, tokens,
        heads, size]. `cu_seq_lens_q` [sequences + 1], int32: where each sequence begins, and the number of tokens;
        None: one sequence. `sliding_window`: a token sees that many, itself included. `softcap`: scores are capped by
        tanh. `s_aux` [heads]: a score for each head that takes part in the softmax and has no value. Raises ValueError
        for attention that is not causal, and for a mask.
        """
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is not None or not causal:
            raise ValueError(f"{type(module).__name__}: has a mask of its own or looks ahead, which a pack cannot keep")
        tokens = query.shape[2]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        longest = max_length_q or tokens
        self._windows.add(sliding_window)
        window = sliding_window if sliding_window and sliding_window < longest else None
        unknown = {"a cap": softcap, "sinks": s_aux is not None, "dropout": dropout}
        unknown |= {} if self._knows_windows else {"a window": window}
        if self._kernel is not None:
            self.without_kernel |= {what for what, value in unknown.items() if value}
        if self._kernel is not None and not any(unknown.values()):
            bounds = torch.tensor([0, tokens], dtype=torch.int32) if cu_seq_lens_q is None else cu_seq_lens_q
            parts = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
            output = self._kernel(*parts, bounds.to(query.device), longest, scale, window).unsqueeze(0)
            if self._has_torchs_order and query.requires_grad:
                output.register_hook(fix_order)  # before the kernel's backward pass, and after it
                query.register_hook(warn_of_order)
            return output, None
        places = [0, tokens] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        compute: Callable[..., torch.Tensor] = exact_attention if softcap or s_aux is not None or window else _plain
        outputs = [
            compute(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scale, window, softcap, s_aux, dropout)
            for a, b in pairwise(places)
            if a < b
        ]
        return torch.cat(outputs, 2).transpose(1, 2), None


def _repeated(query: torch.Tensor, *parts: torch.Tensor, heads: int = 1) -> tuple[torch.Tensor, ...]:
    """Keys and values with each head repeated for the query heads that share it; `heads` is their dimension."""
    same = query.shape[heads] // parts[0].shape[heads]
    return tuple(part.repeat_interleave(same, heads) if same > 1 else part for part in parts)


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *others: Any) -> torch.Tensor:
    """Causal attention of one sequence by torch's own kernel; shapes as in `attend`, the result as `query`."""
    key, value = _repeated(query, key, value)
    return functional.scaled_dot_product_attention(query, key, value, dropout_p=others[-1], is_causal=True, scale=scale)


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention of one sequence, written out: for what no kernel knows, and to check the kernels.

    Shapes as in `Attention.attend`, the result as `query`.
    """
    key, value = _repeated(query, key, value)
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    place = torch.arange(query.shape[2], device=query.device)
    distance = place[:, None] - place
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], 3)
    weights = torch.softmax(scores, 3, dtype=torch.float32).to(query.dtype)[..., : len(place)]
    return functional.dropout(weights, dropout) @ value


def _flash_attn_4(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """A Kernel: FlashAttention 4. It is compiled at its first use, in some 20 s, and kept on the disk."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    from flash_attn.cute import flash_attn_varlen_func

    found = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=(None, None) if window is None else (window - 1, 0),
        deterministic=True,
    )
    output: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return output


def _flash_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """A Kernel: the package flash-attn, version 2."""
    from flash_attn import flash_attn_varlen_func

    output: torch.Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=True,
    )
    return output


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """A Kernel: FlashAttention 2 in torch from version 2.11."""
    from torch.nn.attention.varlen import varlen_attn

    key, value = _repeated(query, key, value)
    both = (-1, 0) if window is None else (window - 1, 0)
    output: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=both)
    return output  # type: ignore[no-any-return]


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    window: None,
) -> torch.Tensor:
    """A Kernel: the memory-efficient one. torch has no public function that gives it cumulative lengths."""
    key, value = _repeated(query, key, value)
    efficient = torch.ops.aten._efficient_attention_forward.default
    # torch 2.2 has one name less
    known = {argument.name for argument in efficient._schema.arguments}
    longest_of = {name: longest for name in ("max_seqlen_q", "max_seqlen_k") if name in known}
    output: torch.Tensor = efficient(
        query[None],
        key[None],
        value[None],
        bias=None,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        **longest_of,
        dropout_p=0.0,
        custom_mask_type=1,  # causal, from the top left
        compute_log_sumexp=True,
        scale=scale,
    )[0][0]
    return output


ORDERED_BY_TORCH = ("varlen", "efficient")
"""Kernels whose backward pass adds up in a fixed order only while torch demands determinism without exception."""


def fix_order(*_: Any) -> None:
    """Have torch refuse what adds up in an order of chance; also as a hook of a gradient."""
    torch.use_deterministic_algorithms(True)


def warn_of_order(*_: Any) -> None:
    """Have torch add up in a fixed order where it can, and warn where it cannot; also as a hook of a gradient."""
    torch.use_deterministic_algorithms(True, warn_only=True)


KERNELS: dict[str, Kernel] = {
    "flash-attn-4": _flash_attn_4,
    "flash-attn": _flash_attn,
    "varlen": _varlen,
    "efficient": _efficient,
}

NEEDS = {
    "flash-attn-4": ((9, 0), "flash_attn.cute"),
    "flash-attn": ((8, 0), "flash_attn.flash_attn_interface"),
    "varlen": ((8, 0), "torch.nn.attention.varlen"),
    "efficient": ((5, 0), "torch"),
}
"""Least compute capability of a kernel, and the module that has it."""

WITHOUT_WINDOW = ("efficient",)
"""Kernels that know no sliding window."""


def choose_kernel(
    capability: tuple[int, int], heads: int, key_heads: int, size: int, dtype: torch.dtype, has_window: bool = False
) -> tuple[str, list[str]]:
    """The fastest kernel that works on this GPU with heads of this shape, and why each faster one does not, in words.

    A kernel works if its output and its gradients are those of `exact_attention`, within what `dtype` can hold; with a
    sliding window too if the model has one, unless the kernel knows none.
    """
    why_not: list[str] = []
    for name in KERNELS:
        windows = (None, 16) if has_window and name not in WITHOUT_WINDOW else (None,)
        problem = missing_for(name, capability, dtype) or _problem(name, heads, key_heads, size, dtype, windows)
        if problem is None:
            return name, why_not
        why_not.append(f"{name}: {problem}")
    return PLAIN, why_not


def missing_for(name: str, capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """What a kernel needs that a GPU of this compute capability, `dtype` or this Python lacks; None if nothing."""
    least, module = NEEDS[name]
    if dtype == torch.float32 and name != "efficient":
        return "computes in 16 bits only"
    if capability < least:
        return f"needs compute capability {least[0]}.{least[1]}, this GPU has {capability[0]}.{capability[1]}"
    parts = module.split(".")  # find_spec raises an error where the package of a module is missing
    packages = [".".join(parts[:number]) for number in range(1, len(parts) + 1)]
    if not all(importlib.util.find_spec(package) for package in packages):
        return f"{module} is not installed"
    return None


def _problem(
    name: str, heads: int, key_heads: int, size: int, dtype: torch.dtype, windows: tuple[int | None, ...]
) -> str | None:
    """What is wrong with a kernel, by two short sequences with each of these windows; None if nothing is."""
    torch.manual_seed(0)
    lengths = [700, 0, 37, 900]  # more than a block of a kernel, and an empty one, as in a padded pass
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda()
    kernel = KERNELS[name]
    for window in windows:
        shapes = [(sum(lengths), count, size) for count in (heads, key_heads, key_heads)]
        inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
        upstream = torch.randn(shapes[0], device="cuda", dtype=dtype)
        try:
            fix_order()
            output = kernel(*inputs, bounds, max(lengths), size**-0.5, window)
            found = [output, *torch.autograd.grad(output, inputs, upstream)]
        except Exception as error:  # noqa: BLE001 - a library's kernel may fail in any way
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        finally:
            warn_of_order()
        exact = [part.detach().float().requires_grad_() for part in inputs]
        parts = [part.transpose(0, 1)[None].split(lengths, 2) for part in exact]
        triples = [(q, k, v) for q, k, v in zip(*parts, strict=True) if q.numel()]
        pieces = [exact_attention(q, k, v, size**-0.5, window)[0] for q, k, v in triples]
        wanted_output = torch.cat(pieces, 1).transpose(0, 1)
        wanted = [wanted_output, *torch.autograd.grad(wanted_output, exact, upstream.float())]
        for one, other in zip(found, wanted, strict=True):
            error_share = float((one.detach().float() - other).detach().norm() / other.detach().norm())
            if not error_share < 0.02:
                return f"differs by {error_share:.1%} from attention in float32"
    return None
