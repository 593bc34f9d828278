"""Scores of an answer's joints.

Predicted and true joints are paired by an optimal assignment (Kuhn 1955), whatever their order. A true joint without a
partner is missing; a predicted one is extra. `official_errors` follows the rule of Real2Code's own evaluation instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean

import numpy as np

from stages.tasks.articulation.geometry import HINGE, Box, Joint, angle, edge_of, line_distance

DEGREES = 5.0
METRES = 0.05
"""Largest errors of a right joint."""


@dataclass(frozen=True)
class Pair:
    """A true joint and the predicted one that is its partner."""

    box: bool
    type: bool
    signed_angle: float
    """Degrees, 0 to 180."""
    angle: float
    """Degrees, 0 to 90, whatever the sign."""
    distance: float | None
    """Metres between two hinges' lines; None if either is a slide, which has no position."""
    edge: bool | None
    """Whether a hinge is at the true corner edge; None if the true joint is a slide."""

    @property
    def is_right(self) -> bool:
        """Whether box and type are right, and the signed axis and the line are within the limits of a right joint."""
        near = self.distance is None or self.distance <= METRES
        return self.box and self.type and self.signed_angle <= DEGREES and near

    @property
    def cost(self) -> float:
        """Cost in the assignment: a wrong box costs more than all other errors together."""
        apart = 0.0 if self.distance is None else min(self.distance, 1.0)
        return 6 * (not self.box) + 2 * (not self.type) + self.angle / 90 + self.signed_angle / 180 + apart


@dataclass(frozen=True)
class Comparison:
    """The joints of an answer paired with the true ones."""

    pairs: Sequence[Pair | None]
    """One for each true joint; None if it is missing."""
    hinges: Sequence[bool]
    """For each true joint, whether it is a hinge."""
    partner: Sequence[int | None]
    """For each true joint, the index of its partner among the predicted joints; None if it is missing."""
    predicted: int
    """Number of joints in the answer."""
    root: bool
    """Whether the answer names the true root."""

    @property
    def missing_count(self) -> int:
        """Number of true joints without a partner."""
        return sum(pair is None for pair in self.pairs)

    @property
    def extra_count(self) -> int:
        """Number of predicted joints without a partner."""
        return self.predicted - (len(self.pairs) - self.missing_count)


def compare(
    predicted: Sequence[Joint | None], true: Sequence[Joint], boxes: Mapping[int, Box], root: bool = True
) -> Comparison:
    """The predicted joints paired with the true ones. A predicted joint whose box does not exist is None and has no
    partner. `root`: whether the answer names the true root."""
    from scipy.optimize import linear_sum_assignment

    known = [place for place, joint in enumerate(predicted) if joint is not None]
    pairs = [[_pair(joint, one, boxes) for joint in predicted if joint is not None] for one in true]
    costs = np.array([[pair.cost for pair in row] for row in pairs]).reshape(len(true), len(known))
    chosen = dict(zip(*(each.tolist() for each in linear_sum_assignment(costs)), strict=True))
    return Comparison(
        [pairs[place][chosen[place]] if place in chosen else None for place in range(len(true))],
        [joint.type == HINGE for joint in true],
        [known[chosen[place]] if place in chosen else None for place in range(len(true))],
        len(predicted),
        root,
    )


def _pair(joint: Joint, true: Joint, boxes: Mapping[int, Box]) -> Pair:
    """The errors of a predicted joint compared with a true one, as a possible pair."""
    box = boxes[true.box]
    hinges = joint.type == true.type == HINGE
    return Pair(
        joint.box == true.box,
        joint.type == true.type,
        angle(joint.axis, true.axis, signed=True),
        angle(joint.axis, true.axis, signed=False),
        line_distance(true, joint, box.center) if hinges else None,
        (hinges and joint.box == true.box and edge_of(joint, box) == edge_of(true, box))
        if true.type == HINGE
        else None,
    )


def metrics(found: Comparison) -> dict[str, float]:
    """Metrics of an object by name, in 0..1; the first one ranks adapters.

    A missing joint counts as wrong in all but `joint_precision` and `root`. `edge` and `line_within_5_cm` are about the
    true hinges, and are left out if there are none.
    """
    right = sum(pair is not None and pair.is_right for pair in found.pairs)
    precision = right / found.predicted if found.predicted else 0.0
    recall = right / len(found.pairs)
    perfect = found.root and right == found.predicted == len(found.pairs)
    hinges = [pair for pair, hinge in zip(found.pairs, found.hinges, strict=True) if hinge]
    values = {
        "joint_f1": 2 * right / (found.predicted + len(found.pairs)),
        "whole_object": float(perfect),
        "joint_precision": precision,
        "joint_recall": recall,
        "root": float(found.root),
    }
    if hinges:
        values["edge"] = fmean(bool(pair and pair.edge) for pair in hinges)
        values["line_within_5_cm"] = fmean(_is_within(pair.distance if pair else None, METRES) for pair in hinges)
    values["axis_within_5_degrees_with_sign"] = fmean(
        _is_within(pair.signed_angle if pair else None, DEGREES) for pair in found.pairs
    )
    values["axis_within_5_degrees"] = fmean(_is_within(pair.angle if pair else None, DEGREES) for pair in found.pairs)
    values["type"] = fmean(bool(pair and pair.type) for pair in found.pairs)
    return values


def _is_within(value: float | None, limit: float) -> bool:
    """Whether a value exists and is at most the limit."""
    return value is not None and value <= limit


def measures(found: Comparison) -> dict[str, list[float]]:
    """Values by name: angles (degrees) and hinge distances (cm) of the paired joints, and the counts of missing and
    extra joints."""
    pairs = [pair for pair in found.pairs if pair is not None]
    return {
        "axis angle with sign, degrees": [pair.signed_angle for pair in pairs],
        "axis angle, degrees": [pair.angle for pair in pairs],
        "hinge line distance, cm": [100 * pair.distance for pair in pairs if pair.distance is not None],
        "missing joints": [float(found.missing_count)],
        "extra joints": [float(found.extra_count)],
    }


# -- the official rule ---------------------------------------------------------------------------------------------

MOST_PERMUTATIONS = 50_000
"""Orders of the predictions that are tried one by one."""


@dataclass(frozen=True)
class OfficialError:
    """The official evaluation's errors of a pair; None if it defines none."""

    type: int
    """1 for the right type, else 0."""
    rotation: float | None = None
    """Degrees."""
    position: float | None = None
    """Metres."""


def official_error(predicted: Joint, true: Joint) -> OfficialError:
    """The official errors of one pair. The sign is never scored, a wrong type has no other error, and only hinges have
    a position error.

    For parallel lines, the position error is the distance along cross(axis, x) alone, or along cross(axis, y) if the
    predicted axis is x. This is too small, and 0 for some lines that are clearly apart. The official code returns NaN
    if it divides 0 by 0 (axis -x) or if rounding lifts a cosine above 1. Here the position error is None in the first
    case, and the cosine is clipped in the second.
    """
    if predicted.type != true.type:
        return OfficialError(0)
    turned = angle(predicted.axis, true.axis, signed=False)
    if true.type != HINGE:
        return OfficialError(1, turned)
    across = np.cross(predicted.axis, true.axis)
    if np.allclose(across, 0):
        along_x = np.allclose(predicted.axis, [1, 0, 0])
        across = np.cross(true.axis, [0, 1, 0]) if along_x else np.cross(predicted.axis, [1, 0, 0])
    length = float(np.linalg.norm(across))
    if length == 0:
        return OfficialError(1, turned)
    return OfficialError(1, turned, abs(float((true.pos - predicted.pos) @ across)) / length)


def official_errors(predicted: Sequence[Joint], true: Sequence[Joint]) -> list[OfficialError]:
    """The errors of the joints that the official evaluation compares (Real2Code, eval_utils/joint_eval.py).

    It compares predicted and true joints position by position. Of all orders of the predictions, it takes the one with
    the lowest mean of mean type error, mean degrees and mean metres. Missing and extra joints are dropped and cost
    nothing; only an empty answer is penalised, with all types wrong. Too few predictions are compared with the first
    true joints.

    Up to MOST_PERMUTATIONS orders are all tried, as in the official code. Beyond that, the order is the one that
    minimises the sum of the three errors over all joints.
    """
    if not predicted:
        return [OfficialError(0) for _ in true]
    count = min(len(predicted), len(true))
    errors = [[official_error(joint, one) for joint in predicted] for one in true[:count]]
    orders = int(np.prod([float(len(predicted) - place) for place in range(count)]))
    if orders > MOST_PERMUTATIONS:
        from scipy.optimize import linear_sum_assignment

        costs = [[1 - each.type + (each.rotation or 0) + (each.position or 0) for each in row] for row in errors]
        rows, columns = (each.tolist() for each in linear_sum_assignment(np.array(costs)))
        return [errors[row][column] for row, column in zip(rows, columns, strict=True)]
    tried = (
        [errors[place][one] for place, one in enumerate(order)] for order in permutations(range(len(predicted)), count)
    )
    return min(tried, key=_official_cost)


def _official_cost(pairs: Sequence[OfficialError]) -> float:
    """The mean of mean type error, mean degrees and mean metres, which the official evaluation minimises."""
    rotations = [pair.rotation for pair in pairs if pair.rotation is not None]
    positions = [pair.position for pair in pairs if pair.position is not None]
    means = (fmean(values) if values else 0.0 for values in (rotations, positions))
    return fmean([fmean(1 - pair.type for pair in pairs), *means])


def official_measures(pairs: Sequence[OfficialError]) -> dict[str, list[float]]:
    """The official errors in degrees and centimetres, by name."""
    return {
        "official rotation error, degrees": [pair.rotation for pair in pairs if pair.rotation is not None],
        "official position error, cm": [100 * pair.position for pair in pairs if pair.position is not None],
    }
