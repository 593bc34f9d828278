"""Peak speeds of cards, to say which share of it a training reaches."""

import re
from collections.abc import Sequence

from stages.hardware.probe import Gpu

PEAKS = {
    r"H100 PCIe": 756e12,
    r"H[12]00(?! NVL)": 989e12,
    r"A[18]00": 312e12,
    r"RTX 4090$": 165.2e12,
    r"V100S": 130e12,
    r"V100-PCIE": 112e12,
    r"V100-SXM2": 125e12,
}
"""Operations per second with dense matrices in 16 bits that are summed in float32, by a pattern of NVIDIA's product
name; the first that is found counts.

From NVIDIA's data sheets of the H100, H200, A100 and V100, and the Ada architecture's whitepaper (V2.01, appendix A).
Those of Hopper print twice this, with sparsity. An A800 is an A100 with slower links. The RTX 4090's figure is half of
the one for sums in float16. Slower cards of the same name (NVL, 4090 D, 4090 Laptop) have no figure here.
"""


def share_of_peak(gpus: Sequence[Gpu], parameters: int, tokens_per_second: float, processes: int) -> float | None:
    """The share of the GPUs' peak speed that LoRA on a base with so many `parameters` reaches; None if it is unknown.

    A token takes four operations per parameter: two forward, and two for the gradients of activations. Attention and
    what checkpointing repeats are not counted. `processes` is the number of GPUs over all machines.
    """
    peaks = {_peak(gpu) for gpu in gpus}
    if len(peaks) != 1 or (peak := peaks.pop()) is None:
        return None
    return 4 * parameters * tokens_per_second / (peak * processes)


def _peak(gpu: Gpu) -> float | None:
    """The peak of one GPU, in operations per second; None if it is unknown."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, gpu.name)), None)
