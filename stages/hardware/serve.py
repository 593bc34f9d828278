"""How many GPUs share a model's weights in inference, and what is left on each for the sequences' keys and values."""

from dataclasses import dataclass

from stages.contract.errors import DoesNotFitError, UsageError
from stages.models.shape import ModelShape

GIB = 1024**3

SHARE = 0.9
"""Of a card's free memory that vLLM is given."""

RUNTIME = 3 * GIB
"""CUDA context, graphs and the activations of a prompt's piece; vLLM measures its own before it shares out the rest."""


@dataclass(frozen=True)
class Serving:
    """How a model is served."""

    tensor_parallel: int
    weights: int
    """Bytes on each GPU."""
    kv_token: int
    """Bytes of keys and values of a token, on each GPU."""
    room: int | None
    """Tokens of all sequences together that fit; None where memory is not known."""
    why: str


def plan_serving(shape: ModelShape, free: list[int], asked: int | None, dtype: str, max_length: int) -> Serving:
    """Serve on cards with `free` bytes each (0: not known): on as many of them as the model's heads can be shared by.

    Raises UsageError for a number that the heads do not allow, DoesNotFitError where weights and one sequence of
    `max_length` tokens do not fit.
    """
    allowed = [n for n in range(1, len(free) + 1) if _divides(shape, n)]
    if asked is not None and asked not in allowed:
        raise UsageError(
            f"infer.tensor_parallel {asked}: {shape.heads} heads and {shape.kv_heads} of keys on {len(free)} GPU(s)"
            f" allow {', '.join(map(str, allowed))}"
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
            f"inference takes {needed:.1f} GiB on each of {count} GPU(s) for one sequence of {max_length} tokens, and"
            f" {least / GIB:.1f} GiB are free: take more GPUs, a shorter infer.max_length, or a quantised model"
        )
    room = left // kv_token
    return Serving(count, weights, kv_token, room, f"{why}; room for {room:,} tokens of all sequences")


def _divides(shape: ModelShape, count: int) -> bool:
    """vLLM gives each GPU the same number of heads, and of heads of keys at least one, shared where there are fewer."""
    return shape.heads % count == 0 and (shape.kv_heads % count == 0 or count % shape.kv_heads == 0)
