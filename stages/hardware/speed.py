"""Expects the speed of a training: from the card's peak, and the share of it that trainings were measured to reach."""

from dataclasses import dataclass, replace
from math import ceil, log

from stages.hardware.fit import Way, relative_time
from stages.hardware.peaks import card_peak, operations_of_a_token
from stages.models.shape import ModelShape


@dataclass(frozen=True)
class MeasuredShare:
    """The share of its card's peak that a training was measured to reach."""

    setting: str
    """The row's `setting`."""
    card: str
    """The card, as in NVIDIA's name for the product."""
    share: float
    """The row's `of the peak`."""
    tokens: int
    """Tokens of a sample, in the mean."""
    pass_tokens: int
    """Most tokens of a pass."""
    checkpointed: float = 0.0
    """Share of the decoder layers that were checkpointed."""
    weights: str = "16 bits"
    """The base's weights: `16 bits`, `nf4`, or the quantisation's method."""
    pictures: bool = False
    """Whether the samples had pictures."""


SOURCE = "benchmarks/results/training.json"

MEASURED: tuple[MeasuredShare, ...] = (
    MeasuredShare("qa, dropout 0.05", "H200", 0.502, 155, 4170),
    MeasuredShare("docs, dropout 0.05", "H200", 0.53, 3078, 16_384),
    MeasuredShare("VL-7B, a page of 1 MP in each sample", "H200", 0.212, 1515, 16_384, pictures=True),
    MeasuredShare("qa, NF4", "H200", 0.292, 153, 4078, weights="nf4"),
    MeasuredShare("qa, GPTQ", "H200", 0.379, 153, 4078, weights="gptq"),
    MeasuredShare("docs, NF4", "H200", 0.479, 3078, 16_384, weights="nf4"),
    MeasuredShare("docs, GPTQ", "H200", 0.588, 3078, 16_384, weights="gptq"),
)
"""Shares from the rows of SOURCE, all of one card and a base of 7 billion parameters.
`tests/hardware/test_speed.py` compares them with the rows, and shows what to write here."""

MEASURED_BATCH = 16
"""Samples of a step in all of them."""

LEAST_WEIGHTS = 3.5e9
"""Weights by which a token is multiplied, from which on a base is like those in MEASURED. A base of half a billion
reached a fifth of their share: launching its short kernels takes longer than computing."""


@dataclass(frozen=True)
class Workload:
    """What a training learns from, over all adapters."""

    samples: int
    """Samples of an epoch; a sample that two adapters learn counts twice."""
    tokens: float
    """Tokens of a sample, in the mean."""


@dataclass(frozen=True)
class ExpectedSpeed:
    """The speed that a training should have."""

    tokens_per_second: float
    """Real tokens, over all GPUs."""
    share_of_peak: float
    why: str
    """What the estimate rests on."""


def expected_speed(shape: ModelShape, way: Way, card: str, tokens: float) -> ExpectedSpeed | None:
    """The speed of a training with samples of so many tokens in the mean, on cards of a product that NVIDIA calls
    `card`.

    The share is that of the measured training whose samples are nearest in length, with the base's kind of weights;
    one on this card comes before others. Shorter passes and more checkpointed layers lower it as
    `relative_time` says. None if the card's peak is unknown, or nothing like it was measured, as with a small or a
    sharded base, or a mixture of experts.
    """
    peak = card_peak(card)
    weights = "nf4" if way.settings.load_in_4bit else shape.quantisation or "16 bits"
    pictures = shape.vision is not None
    alike = [one for one in MEASURED if (one.weights, one.pictures) == (weights, pictures)]
    unlike = operations_of_a_token(shape) < 4 * LEAST_WEIGHTS or shape.active_experts < 1
    if peak is None or unlike or not alike or way.sharding != "none" or way.dtype == "float32":
        return None
    nearest = min(alike, key=lambda one: (one.card not in card, abs(log(one.tokens / tokens))))
    # a pass has no more than the samples of a step
    own_tokens = min(way.step.pass_tokens, ceil(way.step.samples_of_a_process * tokens))
    own = replace(way.step, pass_tokens=own_tokens)
    measured = replace(
        way.step,
        pass_tokens=min(nearest.pass_tokens, MEASURED_BATCH * nearest.tokens),
        checkpointed_layers=round(nearest.checkpointed * shape.layers),
    )
    share = nearest.share * relative_time(measured, shape.layers) / relative_time(own, shape.layers)
    speed = share * peak * way.step.processes / operations_of_a_token(shape)
    others = "" if nearest.card in card else "; this card has not been measured"
    why = f"an estimate, from the share that an {nearest.card} reached ({SOURCE}: {nearest.setting}){others}"
    return ExpectedSpeed(speed, share, why)
