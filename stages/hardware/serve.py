"""Plans inference: how many GPUs share a model's weights, and how much memory is left for the KV cache."""

from dataclasses import dataclass

from stages.contract.errors import DoesNotFitError, UsageError
from stages.models.shape import ModelShape

GIB = 1024**3

SHARE = 0.9
"""Share of a GPU's free memory that vLLM may use."""

RUNTIME = 3 * GIB
"""Bytes for the CUDA context, CUDA graphs and the activations of a chunk of a prompt. vLLM measures the real figure
before it allots the rest."""


@dataclass(frozen=True)
class Serving:
    """How vLLM serves a model."""

    tensor_parallel: int
    """GPUs that share the weights."""
    weights: int
    """Bytes of the weights on each GPU."""
    kv_token: int
    """Bytes that a token's keys and values take on each GPU."""
    room: int | None
    """Tokens that fit in the KV cache, over all sequences; None if the memory is not known."""
    why: str
    """Reason for tensor_parallel, and the room in words."""


def plan_serving(shape: ModelShape, free: list[int], asked: int | None, dtype: str, max_length: int) -> Serving:
    """The plan to serve a model on `asked` GPUs; None: on as many GPUs as the model's heads can be split over.

    `free` has the free bytes of each GPU; 0: not known. The GPUs with the most free memory count. If one of those is 0,
    `room` is None and nothing is checked against memory. Raises UsageError if the heads cannot be split over `asked`
    GPUs, and DoesNotFitError if the weights and one sequence of `max_length` tokens do not fit.
    """
    allowed = [n for n in range(1, len(free) + 1) if _can_split_heads(shape, n)]
    if asked is not None and asked not in allowed:
        raise UsageError(
            f"infer.tensor_parallel {asked}: {shape.heads} heads and {shape.kv_heads} KV heads cannot be split"
            f" over so many of {len(free)} GPU(s); set it to {' or '.join(map(str, allowed))}"
        )
    count = asked or allowed[-1]
    size = 4 if dtype == "float32" else 2
    weights = sum(w.count * size if w.dtype.startswith(("F", "BF")) else w.stored_bytes for w in shape.weights) // count
    kv_token = 2 * shape.layers * max(shape.kv_heads // count, 1) * shape.head_size * size
    why = f"infer.tensor_parallel, of {len(free)} GPU(s)" if asked else f"as many of {len(free)} GPU(s) as heads allow"
    least = min(sorted(free, reverse=True)[:count])
    if not least:
        return Serving(count, weights, kv_token, None, why)
    left = round(SHARE * least) - weights - RUNTIME
    if left < kv_token * max_length:
        needed = (weights + RUNTIME + kv_token * max_length) / SHARE / GIB
        raise DoesNotFitError(
            f"infer.max_length {max_length}: inference takes {needed:.1f} GiB on each of {count} GPU(s) for one such"
            f" sequence, but {least / GIB:.1f} GiB are free; use more GPUs, a lower infer.max_length, or a quantised"
            " model"
        )
    room = left // kv_token
    return Serving(count, weights, kv_token, room, f"{why}; room for {room:,} tokens of all sequences")


def _can_split_heads(shape: ModelShape, count: int) -> bool:
    """Whether vLLM can split the heads over `count` GPUs.

    Each GPU gets the same number of heads and of KV heads. With fewer KV heads than GPUs, several get a copy of one.
    """
    return shape.heads % count == 0 and (shape.kv_heads % count == 0 or count % shape.kv_heads == 0)
