"""Which share of a card's peak a training reaches."""

from dataclasses import replace

import pytest

from stages.hardware.peaks import card_peak, operations_of_a_token, share_of_peak
from stages.hardware.probe import Gpu
from stages.hardware.targets import load_targets
from stages.models.shape import ModelShape, Weight, read_shape
from tests.hardware.shapes import make_shape


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return read_shape(make_shape(tmp_path_factory.mktemp("shape"), "Qwen2.5-7B"))


def card(name: str) -> Gpu:
    return Gpu(0, "GPU-0", name, (9, 0), 0, 0, "")


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("NVIDIA H200", 0.458),
        ("NVIDIA H100 80GB HBM3", 0.458),
        ("NVIDIA H100 PCIe", 0.598),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", 0.458),
        ("NVIDIA A800-SXM4-80GB", 1.450),
        ("NVIDIA GeForce RTX 4090", 2.739),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-32GB", 3.620),
        ("Tesla V100-PCIE-16GB", 4.040),
        ("Tesla V100S-PCIE-32GB", 3.480),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_four_operations_per_weight_and_token(seven: ModelShape, name: str, share: float | None) -> None:
    found = share_of_peak([card(name)], seven, 16_000, 1)
    assert found is None if share is None else found == pytest.approx(share, abs=0.001)
    assert card_peak(name.replace(" ", "-")) == card_peak(name), "as Kubernetes writes it"


def test_the_cards_of_all_targets_have_a_peak() -> None:
    cards = [target.node_label for target in load_targets().values() if target.node_label]
    assert len(cards) >= 4 and all(map(card_peak, cards))


def test_embeddings_and_experts_that_a_token_does_not_pass_are_not_multiplied(seven: ModelShape) -> None:
    embeddings = 152064 * 3584
    biases_and_norms = 28 * (3584 + 2 * 512) + (2 * 28 + 1) * 3584
    assert operations_of_a_token(seven) == 4 * (seven.parameters - embeddings - biases_and_norms)
    names = ("model.layers.0.mlp.experts.1.up_proj.weight", "visual.blocks.0.mlp.fc1.weight", "lm_head.weight")
    apart = [Weight(name, (100, 10), "BF16") for name in names]
    stacked = [
        Weight("model.layers.0.mlp.experts.gate_up_proj", (8, 10, 20), "BF16"),
        Weight("model.layers.0.mlp.experts.down_proj_blocks", (8, 10, 2, 16), "U8"),
        Weight("model.layers.0.mlp.experts.down_proj_scales", (8, 10, 2), "U8"),
    ]
    mixture = replace(seven, weights=(*apart, *stacked), active_experts=0.25)
    assert operations_of_a_token(mixture) == 4 * (1000 + 0.25 * (1000 + 1600 + 2 * 2560))


def test_several_cards_have_the_sum_of_their_peaks_and_mixed_ones_none(seven: ModelShape) -> None:
    both = [card("NVIDIA H200")] * 2
    one, two = share_of_peak(both[:1], seven, 1e4, 1), share_of_peak(both, seven, 1e4, 2)
    assert one is not None and two == pytest.approx(one / 2)
    assert share_of_peak([card("NVIDIA H200"), card("NVIDIA A800-SXM4-80GB")], seven, 1e4, 2) is None
    assert share_of_peak([], seven, 1e4, 1) is None
