"""Which share of a card's peak a training reaches."""

import pytest

from stages.hardware.peaks import share_of_peak
from stages.hardware.probe import Gpu


def card(name: str) -> Gpu:
    return Gpu(0, "GPU-0", name, (9, 0), 0, 0, "")


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("NVIDIA H200", 0.493),
        ("NVIDIA H100 80GB HBM3", 0.493),
        ("NVIDIA H100 PCIe", 0.644),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", 0.493),
        ("NVIDIA A800-SXM4-80GB", 1.562),
        ("NVIDIA GeForce RTX 4090", 2.950),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-32GB", 3.899),
        ("Tesla V100-PCIE-16GB", 4.352),
        ("Tesla V100S-PCIE-32GB", 3.749),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_four_operations_per_parameter_and_token(name: str, share: float | None) -> None:
    found = share_of_peak([card(name)], 7_615_616_512, 16_000, 1)
    assert found is None if share is None else found == pytest.approx(share, abs=0.001)


def test_several_cards_have_the_sum_of_their_peaks_and_mixed_ones_none() -> None:
    both = [card("NVIDIA H200")] * 2
    one, two = share_of_peak(both[:1], 10**9, 1e4, 1), share_of_peak(both, 10**9, 1e4, 2)
    assert one is not None and two == pytest.approx(one / 2)
    assert share_of_peak([card("NVIDIA H200"), card("NVIDIA A800-SXM4-80GB")], 10**9, 1e4, 2) is None
    assert share_of_peak([], 10**9, 1e4, 1) is None
