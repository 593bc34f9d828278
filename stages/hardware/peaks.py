"""Peak speeds of cards, to say which share of it a training reaches."""

import re
from collections.abc import Sequence
from math import prod

from stages.hardware.memory import is_vision_or_connector
from stages.hardware.probe import Gpu
from stages.models.shape import ModelShape

PEAKS = {
    r"H100.PCIe": 756e12,
    r"H[12]00(?!.NVL)": 989e12,
    r"A[18]00(?!\d)": 312e12,
    r"RTX.4090$": 165.2e12,
    r"V100S": 130e12,
    r"V100-PCIE": 112e12,
    r"V100-SXM2": 125e12,
}
"""Operations per second with dense matrices in 16 bits that are summed in float32, by a pattern of NVIDIA's product
name, with blanks or dashes between its words; the first that is found counts.

From NVIDIA's data sheets of the H100, H200, A100 and V100, and the Ada architecture's whitepaper (V2.01, appendix A).
Those of Hopper print twice this, with sparsity. An A800 is an A100 with slower links. The RTX 4090's figure is half of
the one for sums in float16. Slower cards of the same name (NVL, 4090 D, 4090 Laptop) have no figure here.
"""


def share_of_peak(gpus: Sequence[Gpu], shape: ModelShape, tokens_per_second: float, processes: int) -> float | None:
    """The share of the GPUs' peak speed that LoRA on a base of this shape reaches; None if it is unknown.

    Attention and what checkpointing repeats are not counted. `processes` is the number of GPUs over all machines.
    """
    peaks = {card_peak(gpu.name) for gpu in gpus}
    if len(peaks) != 1 or (peak := peaks.pop()) is None:
        return None
    return operations_of_a_token(shape) * tokens_per_second / (peak * processes)


def operations_of_a_token(shape: ModelShape) -> float:
    """Operations that a token takes in LoRA's training: four for each weight of the language model by which it is
    multiplied, two forward, and two for the gradients of activations.

    Embeddings are looked up, not multiplied. Of a mixture's experts, only those that a token passes count.
    """
    dense = sum(
        prod(sizes) * (shape.active_experts if _is_expert(name) else 1)
        for name, sizes in shape.linears.items()
        if not is_vision_or_connector(name)
    )
    stacked = sum(
        weight.unpacked_count for weight in shape.weights if _is_expert(weight.name) and len(weight.shape) > 2
    )
    return 4 * (dense + stacked * shape.active_experts)


def _is_expert(name: str) -> bool:
    """Whether a module or a weight belongs to a mixture's experts, one of them or all in one tensor."""
    return "experts" in name.split(".")


def card_peak(product: str) -> float | None:
    """The peak of one GPU by NVIDIA's name for its product, in operations per second; None if it is unknown."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, product)), None)
