"""Triton kernels for training on a GPU: what torch would do in several passes over memory, done in one.

Every function here has the result of the plain torch code that its docstring shows. Matrices are contiguous, [rows,
columns] by rows. Triton: https://triton-lang.org. It compiles a kernel at its first use and keeps it in
TRITON_CACHE_DIR. With TRITON_INTERPRET=1 the same code runs on a CPU, which is how the tests check it without a GPU.
"""

import torch
import triton
import triton.language as tl

from stages.hardware.memory import LEAST_RANK
from stages.train.dropout import Dropout

ROWS, COLUMNS = 64, 128
"""Block of a matrix that one program works on. The fastest of 18 shapes on an H200 with 8,192 tokens of a 7B's size;
where a kernel has others, those were."""

HEADS = 32
"""Most heads that one program rotates."""

OF_ANY_VALUE = ["tokens", "salt", "threshold"]
"""Arguments that change from pass to pass or from module to module: without this, Triton compiles a kernel again for
multiples of 16 and for 1 (4.6 s in the middle of a training, measured on an H200)."""


def columns_for(rank: int, most: int = COLUMNS) -> int:
    """Columns of a block next to which a program holds `rank` rows or columns of LoRA: fewer for a high rank, so that
    they fit the shared memory of an RTX 4090, the smallest."""
    return max(16, min(most, 8192 // rank))


def padded_rank(rank: int) -> int:
    """The number of rows or columns to which a matrix of LoRA is padded with zeros, as Triton's products need."""
    return max(LEAST_RANK, int(triton.next_power_of_2(rank)))


# -- LoRA's products with dropout --------------------------------------------------------------------------------


@triton.jit
def _is_kept(row_numbers, feature, salt, threshold):  # type: ignore[no-untyped-def]
    """Dropout.keep for a block: [rows, features]."""
    mixed = row_numbers[:, None].to(tl.uint32) ^ (feature.to(tl.uint32) * 0x9E3779B1 + salt.to(tl.uint32))[None, :]
    mixed ^= mixed >> 16
    mixed *= 0x85EBCA6B
    mixed ^= mixed >> 13
    mixed *= 0xC2B2AE35
    mixed ^= mixed >> 16
    # as in Dropout.keep, the hash counts from the smallest signed number
    return (mixed ^ 0x80000000) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=OF_ANY_VALUE)
def _dropped_product(  # type: ignore[no-untyped-def]
    X, A, NUMBERS, OUT, tokens, features, salt, threshold, upscale, span,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """OUT[part] = dropped X[:, features of the part] @ A[:, features of the part]' for one block of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < tokens
    rank = tl.arange(0, RANK)
    numbers = tl.load(NUMBERS + row, mask=is_row, other=0)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, features)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(first, last, COLUMNS):
        feature = start + tl.arange(0, COLUMNS)
        is_feature = feature < last
        x = tl.load(
            X + row[:, None].to(tl.int64) * features + feature[None, :],
            mask=is_row[:, None] & is_feature[None, :],
            other=0.0,
        )
        x = tl.where(_is_kept(numbers, feature, salt, threshold), x, 0.0)
        a = tl.load(A + rank[:, None] * features + feature[None, :], mask=is_feature[None, :], other=0.0)
        total += tl.dot(x, tl.trans(a), input_precision="ieee")
    where = (tl.program_id(1) * tokens + row[:, None]) * RANK + rank[None, :]
    tl.store(OUT + where, total * upscale, mask=is_row[:, None])


def dropped_product(x: torch.Tensor, a: torch.Tensor, dropout: Dropout, salt: int) -> torch.Tensor:
    """`dropout.apply(x, salt) @ a.t()` for x [tokens, features] and a [rank, features]; in x's type."""
    tokens, features = x.shape
    blocks = triton.cdiv(tokens, ROWS)
    # few rows make few programs: split the sum over the features, so that all of the card works
    parts = max(1, min(triton.cdiv(features, 512), 1056 // blocks))
    columns = columns_for(a.shape[0])
    span = triton.cdiv(triton.cdiv(features, parts), columns) * columns
    parts = triton.cdiv(features, span)
    out = torch.empty(parts, tokens, a.shape[0], device=x.device, dtype=torch.float32)
    _dropped_product[(blocks, parts)](
        x, a, dropout.rows, out, tokens, features, salt, dropout.threshold, dropout.upscale, span,
        a.shape[0], ROWS, columns, num_warps=4, num_stages=3 if a.shape[0] < 128 else 2,
    )  # fmt: skip
    return out.sum(0).to(x.dtype) if parts > 1 else out[0].to(x.dtype)


@triton.jit(do_not_specialize=OF_ANY_VALUE)
def _add_dropped(  # type: ignore[no-untyped-def]
    DX, INNER, A, NUMBERS, tokens, features, salt, threshold, upscale,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """DX += dropped (INNER @ A) for one block."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    is_row, is_feature = row < tokens, feature < features
    numbers = tl.load(NUMBERS + row, mask=is_row, other=0)
    inner = tl.load(INNER + row[:, None] * RANK + rank[None, :], mask=is_row[:, None], other=0.0)
    a = tl.load(A + rank[:, None] * features + feature[None, :], mask=is_feature[None, :], other=0.0)
    more = tl.dot(inner, a, input_precision="ieee") * upscale
    more = tl.where(_is_kept(numbers, feature, salt, threshold), more, 0.0)
    where = DX + row[:, None].to(tl.int64) * features + feature[None, :]
    inside = is_row[:, None] & is_feature[None, :]
    tl.store(where, (tl.load(where, mask=inside, other=0.0) + more).to(DX.dtype.element_ty), mask=inside)


def add_dropped(d_x: torch.Tensor, d_inner: torch.Tensor, a: torch.Tensor, dropout: Dropout, salt: int) -> None:
    """`d_x += dropout.apply(d_inner @ a, salt)`, in place."""
    tokens, features = d_x.shape
    rows, columns = 32, columns_for(a.shape[0])
    _add_dropped[(triton.cdiv(tokens, rows), triton.cdiv(features, columns))](
        d_x, d_inner, a, dropout.rows, tokens, features, salt, dropout.threshold, dropout.upscale,
        a.shape[0], rows, columns, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=OF_ANY_VALUE)
def _dropped_outer(  # type: ignore[no-untyped-def]
    X, INNER, NUMBERS, OUT, tokens, features, salt, threshold, upscale, span,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """OUT[part] = INNER[rows of the part]' @ dropped X[rows of the part] for one block of features."""
    feature = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_feature = feature < features
    rank = tl.arange(0, RANK)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, tokens)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < last
        numbers = tl.load(NUMBERS + row, mask=is_row, other=0)
        x = tl.load(
            X + row[:, None].to(tl.int64) * features + feature[None, :],
            mask=is_row[:, None] & is_feature[None, :],
            other=0.0,
        )
        x = tl.where(_is_kept(numbers, feature, salt, threshold), x, 0.0)
        inner = tl.load(INNER + row[:, None] * RANK + rank[None, :], mask=is_row[:, None], other=0.0)
        total += tl.dot(tl.trans(inner), x, input_precision="ieee")
    where = (tl.program_id(1) * RANK + rank[:, None]) * features + feature[None, :]
    tl.store(OUT + where, total * upscale, mask=is_feature[None, :])


def dropped_outer(x: torch.Tensor, d_inner: torch.Tensor, dropout: Dropout, salt: int) -> torch.Tensor:
    """`d_inner.t() @ dropout.apply(x, salt)`, [rank, features], in float32."""
    tokens, features = x.shape
    rank = d_inner.shape[1]
    columns = columns_for(rank)
    blocks = triton.cdiv(features, columns)
    parts = max(1, min(triton.cdiv(tokens, 256), 1056 // blocks))
    span = triton.cdiv(triton.cdiv(tokens, parts), ROWS) * ROWS
    parts = triton.cdiv(tokens, span)
    out = torch.empty(parts, rank, features, device=x.device, dtype=torch.float32)
    _dropped_outer[(blocks, parts)](
        x, d_inner, dropout.rows, out, tokens, features, salt, dropout.threshold, dropout.upscale, span,
        rank, ROWS, columns, num_warps=4, num_stages=3 if rank < 128 else 2,
    )  # fmt: skip
    return out.sum(0) if parts > 1 else out[0]


# -- SwiGLU with LoRA on gate and up -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def _swiglu(  # type: ignore[no-untyped-def]
    GATE, UP, INNER, B_GATE, B_UP, OUT, tokens, features,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """OUT = silu(GATE + INNER @ B_GATE') * (UP + INNER @ B_UP') for one block."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    is_row, is_feature = row < tokens, feature < features
    inside = is_row[:, None] & is_feature[None, :]
    where = row[:, None].to(tl.int64) * features + feature[None, :]
    inner = tl.load(INNER + row[:, None] * RANK + rank[None, :], mask=is_row[:, None], other=0.0)
    b_gate = tl.load(B_GATE + feature[:, None] * RANK + rank[None, :], mask=is_feature[:, None], other=0.0)
    b_up = tl.load(B_UP + feature[:, None] * RANK + rank[None, :], mask=is_feature[:, None], other=0.0)
    gate = tl.load(GATE + where, mask=inside, other=0.0) + tl.dot(inner, tl.trans(b_gate), input_precision="ieee")
    up = tl.load(UP + where, mask=inside, other=0.0) + tl.dot(inner, tl.trans(b_up), input_precision="ieee")
    tl.store(OUT + where, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty), mask=inside)


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, inner: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor
) -> torch.Tensor:
    """`silu(gate + inner @ b_gate.t()) * (up + inner @ b_up.t())`.

    `gate` and `up` [tokens, features], `inner` [tokens, rank], the others [features, rank].
    """
    tokens, features = gate.shape
    out = torch.empty_like(gate)
    rows, columns = 64, columns_for(inner.shape[1], 64)
    _swiglu[(triton.cdiv(tokens, rows), triton.cdiv(features, columns))](
        gate, up, inner, b_gate, b_up, out, tokens, features, inner.shape[1], rows, columns, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=OF_ANY_VALUE)
def _swiglu_backward(  # type: ignore[no-untyped-def]
    GATE, UP, INNER, B_GATE, B_UP, D_OUT, D_DOWN, A_DOWN, NUMBERS, tokens, features, salt, threshold, upscale,
    RANK: tl.constexpr, DOWN_RANK: tl.constexpr, DROP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """In place, for one block: GATE and UP become their gradients, D_OUT becomes the output of `_swiglu`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank, down_rank = tl.arange(0, RANK), tl.arange(0, DOWN_RANK)
    is_row, is_feature = row < tokens, feature < features
    inside = is_row[:, None] & is_feature[None, :]
    where = row[:, None].to(tl.int64) * features + feature[None, :]
    inner = tl.load(INNER + row[:, None] * RANK + rank[None, :], mask=is_row[:, None], other=0.0)
    b_gate = tl.load(B_GATE + feature[:, None] * RANK + rank[None, :], mask=is_feature[:, None], other=0.0)
    gate = tl.load(GATE + where, mask=inside, other=0.0) + tl.dot(inner, tl.trans(b_gate), input_precision="ieee")
    b_up = tl.load(B_UP + feature[:, None] * RANK + rank[None, :], mask=is_feature[:, None], other=0.0)
    up = tl.load(UP + where, mask=inside, other=0.0) + tl.dot(inner, tl.trans(b_up), input_precision="ieee")
    d_down = tl.load(D_DOWN + row[:, None] * DOWN_RANK + down_rank[None, :], mask=is_row[:, None], other=0.0)
    a_down = tl.load(A_DOWN + down_rank[:, None] * features + feature[None, :], mask=is_feature[None, :], other=0.0)
    more = tl.dot(d_down, a_down, input_precision="ieee") * upscale
    if DROP:
        numbers = tl.load(NUMBERS + row, mask=is_row, other=0)
        more = tl.where(_is_kept(numbers, feature, salt, threshold), more, 0.0)
    d_out = tl.load(D_OUT + where, mask=inside, other=0.0) + more
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(D_OUT + where, (silu * up).to(D_OUT.dtype.element_ty), mask=inside)
    tl.store(UP + where, (d_out * silu).to(UP.dtype.element_ty), mask=inside)
    slope = sigmoid + silu * (1 - sigmoid)
    tl.store(GATE + where, (d_out * up * slope).to(GATE.dtype.element_ty), mask=inside)


def swiglu_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    inner: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
    d_out: torch.Tensor,
    d_down: torch.Tensor,
    a_down: torch.Tensor,
    dropout: Dropout | None,
    salt: int,
) -> None:
    """The backward pass of `swiglu`, whose output went into a down projection with LoRA, in place.

    `d_out` has the gradient through the base's part of that projection, `d_down` [tokens, rank] that of LoRA's inner
    product, `a_down` [rank, features] its A; `dropout` and `salt` are those of its input. Afterwards `gate` and `up`
    have the gradients of the two products, and `d_out` has the output of `swiglu`, made again.
    """
    tokens, features = gate.shape
    threshold, upscale = (dropout.threshold, dropout.upscale) if dropout else (0, 1.0)
    rows = 16  # six matrices at once: more rows do not fit the registers
    columns = columns_for(max(inner.shape[1], d_down.shape[1]))
    _swiglu_backward[(triton.cdiv(tokens, rows), triton.cdiv(features, columns))](
        gate, up, inner, b_gate, b_up, d_out, d_down, a_down, dropout.rows if dropout else gate,
        tokens, features, salt, threshold, upscale, inner.shape[1], d_down.shape[1], dropout is not None,
        rows, columns, num_warps=8,
    )  # fmt: skip


# -- RMSNorm and rotary positions --------------------------------------------------------------------------------


@triton.jit
def _rms_norm(X, WEIGHT, OUT, SCALE, features, epsilon, offset, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """OUT = X / rms(X) * (WEIGHT + offset) for one row; SCALE = 1 / rms(X)."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < features
    x = tl.load(X + row * features + feature, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / features + epsilon)
    tl.store(SCALE + row, scale)
    weight = tl.load(WEIGHT + feature, mask=inside, other=0.0).to(tl.float32) + offset
    # as transformers does: the normalised value has the input's type before it is multiplied
    normal = (x * scale).to(X.dtype.element_ty).to(tl.float32)
    tl.store(OUT + row * features + feature, (normal * weight).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(X, WEIGHT, D_OUT, D_X, SCALE, features, offset, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of one row of X."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < features
    x = tl.load(X + row * features + feature, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(D_OUT + row * features + feature, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + feature, mask=inside, other=0.0).to(tl.float32) + offset
    scale = tl.load(SCALE + row)
    d_normal = d_out * weight
    mean = tl.sum(d_normal * x, 0) * scale * scale / features
    tl.store(D_X + row * features + feature, ((d_normal - x * mean) * scale).to(D_X.dtype.element_ty), mask=inside)


class RmsNorm(torch.autograd.Function):
    """`x / sqrt(mean(x ** 2) + epsilon) * (weight + offset)` over the last dimension; the weight is frozen."""

    @staticmethod
    def forward(ctx, x, weight, epsilon, offset):  # type: ignore[no-untyped-def]
        """Compute the norm of x [..., features] with `weight` [features]."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out, scale = torch.empty_like(flat), torch.empty(len(flat), device=x.device, dtype=torch.float32)
        block = triton.next_power_of_2(x.shape[-1])
        _rms_norm[(len(flat),)](flat, weight, out, scale, flat.shape[1], epsilon, offset, block, num_warps=8)
        ctx.save_for_backward(flat, weight, scale)
        ctx.offset = offset
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        """The gradient of x."""
        flat, weight, scale = ctx.saved_tensors
        d_out = gradients[0].reshape(flat.shape).contiguous()
        d_x = torch.empty_like(flat)
        block = triton.next_power_of_2(flat.shape[1])
        _rms_norm_backward[(len(flat),)](flat, weight, d_out, d_x, scale, flat.shape[1], ctx.offset, block, num_warps=8)
        return d_x.view(gradients[0].shape), None, None, None


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    X, COS, SIN, OUT, heads, half, token_stride, head_stride, sign, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """OUT = X cos + rotate_half(X) sin for HEADS heads of one token, the halves [:half] and [half:] of its features."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    feature = tl.arange(0, BLOCK)
    is_feature = feature < half
    inside = (head < heads)[:, None] & is_feature[None, :]
    start = X + token * token_stride + head[:, None] * head_stride + feature[None, :]
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(COS + token * half * 2 + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + token * half * 2 + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :] * sign
    out = OUT + (token * heads + head[:, None]) * half * 2 + feature[None, :]
    tl.store(out, (first * cos - second * sin).to(OUT.dtype.element_ty), mask=inside)
    tl.store(out + half, (second * cos + first * sin).to(OUT.dtype.element_ty), mask=inside)


class Rotate(torch.autograd.Function):
    """Rotary position embedding: `x * cos + rotate_half(x) * sin`, whose two halves have the same angles."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[no-untyped-def]
        """Rotate x [1, heads, tokens, size] by angles with `cos` and `sin` [1, tokens, size]."""
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        """The gradient of x: the other way around."""
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, sin, -1.0), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """x [1, heads, tokens, size] rotated; laid out by tokens, then heads, as attention reads it."""
    _, heads, tokens, size = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(1, tokens, heads, size, device=x.device, dtype=x.dtype)
    together = min(triton.next_power_of_2(heads), HEADS)
    _rotate[(tokens, triton.cdiv(heads, together))](
        x, cos.contiguous(), sin.contiguous(), out, heads, size // 2, x.stride(2), x.stride(1), sign,
        together, triton.next_power_of_2(size // 2), num_warps=2,
    )  # fmt: skip
    return out.transpose(1, 2)


# -- cross entropy -----------------------------------------------------------------------------------------------


@triton.jit
def _cross_entropy(LOGITS, TARGETS, LOSSES, RIGHT, vocabulary, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The loss of one row of LOGITS, whether its target is the highest, and, in place of the logits, their gradient."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    own = tl.load(LOGITS + row * vocabulary + tl.maximum(target, 0)).to(tl.float32)
    highest = -float("inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        word = start + tl.arange(0, BLOCK)
        logits = tl.load(LOGITS + row * vocabulary + word, mask=word < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher), 0)
        highest = higher
    counts = target >= 0
    tl.store(LOSSES + row, tl.where(counts, tl.log(total) + highest - own, 0.0))
    tl.store(RIGHT + row, tl.where(counts & (own >= highest), 1.0, 0.0))
    for start in range(0, vocabulary, BLOCK):
        word = start + tl.arange(0, BLOCK)
        logits = tl.load(LOGITS + row * vocabulary + word, mask=word < vocabulary, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(logits - highest) / total - tl.where(word == target, 1.0, 0.0)
        gradient = tl.where(counts, gradient, 0.0)
        tl.store(LOGITS + row * vocabulary + word, gradient.to(LOGITS.dtype.element_ty), mask=word < vocabulary)


def cross_entropy_in_place(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the cross entropies and the number of targets with the highest logit, scalars in float32.

    `logits` [rows, vocabulary] become the gradient of the sum. A target below 0 has no loss.
    """
    rows = len(logits)
    losses, right = torch.empty(2, rows, device=logits.device, dtype=torch.float32)
    _cross_entropy[(rows,)](logits, targets, losses, right, logits.shape[1], 8192, num_warps=16)
    return losses.sum(), right.sum()
