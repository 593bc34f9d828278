"""Scores of joints in cases worked by hand from the rules in stages/tasks/articulation/scoring.py and in Real2Code's
eval_utils/joint_eval.py.

Most cases use one cabinet: a body (box 0), a left and a right door (1, 2) and a drawer (3). Its front faces -x; the
doors' lines are x = -0.3, y = 0.4 and y = -0.4; the drawer slides to -x.
"""

import math
from typing import Any

import numpy as np
import pytest

from stages.contract.recipe import Recipe, load_recipe
from stages.contract.records import Sample, failed_prediction
from stages.eval.measures import Measure, measure_answers
from stages.eval.scores import score_models
from stages.tasks import articulation, settle_recipe
from stages.tasks.articulation.geometry import HINGE, SLIDE, Box, Joint, line_distance
from stages.tasks.articulation.scoring import (
    OfficialError,
    compare,
    measures,
    metrics,
    official_error,
    official_errors,
)
from tests.conftest import REPOSITORY

RECIPE = REPOSITORY / "recipes" / "articulation.yaml"


def box(x: float, y: float, z: float, *extent: float) -> Box:
    return Box(np.array([x, y, z]), np.eye(3), np.array(extent))


BOXES = {
    0: box(0, 0, 0.5, 0.6, 0.8, 1),
    1: box(-0.32, 0.2, 0.6, 0.04, 0.4, 0.6),
    2: box(-0.32, -0.2, 0.6, 0.04, 0.4, 0.6),
    3: box(-0.1, 0, 0.15, 0.4, 0.8, 0.3),
}


def hinge(number: int, x: float, y: float, axis: Any = (0, 0, 1), z: float = 0.6) -> Joint:
    axis = np.array(axis, float)
    return Joint(number, HINGE, np.array([x, y, z]), axis / np.linalg.norm(axis))


def slide(number: int, axis: Any = (-1, 0, 0)) -> Joint:
    axis = np.array(axis, float)
    return Joint(number, SLIDE, BOXES[number].center, axis / np.linalg.norm(axis))


def tilted(degrees: float) -> tuple[float, float, float]:
    """The unit vector along z, tilted towards y."""
    return 0, math.sin(math.radians(degrees)), math.cos(math.radians(degrees))


LEFT, RIGHT, DRAWER = hinge(1, -0.3, 0.4, (0, 0, -1)), hinge(2, -0.3, -0.4), slide(3)
TRUE = [LEFT, RIGHT, DRAWER]
ALL = {
    "joint_f1": 1, "whole_object": 1, "joint_precision": 1, "joint_recall": 1, "root": 1, "edge": 1,
    "line_within_5_cm": 1, "axis_within_5_degrees_with_sign": 1, "axis_within_5_degrees": 1, "type": 1,
}  # fmt: skip
"""Metrics of a perfect answer."""
THIRD, TWO_THIRDS = 1 / 3, 2 / 3
ONE_WRONG = {"joint_f1": TWO_THIRDS, "whole_object": 0, "joint_precision": TWO_THIRDS, "joint_recall": TWO_THIRDS}

CASES: dict[str, tuple[list[Joint | None], dict[str, float], tuple[int, int]]] = {
    # predicted joints; metrics that differ from ALL; numbers of missing and extra joints
    "1 all right": (TRUE, {}, (0, 0)),
    "2 in another order": ([DRAWER, RIGHT, LEFT], {}, (0, 0)),
    "3 another point of the same line": ([hinge(1, -0.3, 0.4, (0, 0, -1), z=9), RIGHT, DRAWER], {}, (0, 0)),
    "4 one missing: recall 2/3, F1 2*2/(2+3)": (
        [LEFT, DRAWER],
        {"joint_f1": 0.8, "whole_object": 0, "joint_recall": TWO_THIRDS, "edge": 0.5, "line_within_5_cm": 0.5,
         "axis_within_5_degrees_with_sign": TWO_THIRDS, "axis_within_5_degrees": TWO_THIRDS, "type": TWO_THIRDS},
        (1, 0),
    ),
    "5 one extra: precision 3/4, F1 2*3/(4+3)": (
        [*TRUE, hinge(0, 0, 0)],
        {"joint_f1": 6 / 7, "whole_object": 0, "joint_precision": 0.75},
        (0, 1),
    ),
    "6 one twice": (
        [LEFT, LEFT, RIGHT, DRAWER], {"joint_f1": 6 / 7, "whole_object": 0, "joint_precision": 0.75}, (0, 1)),
    "7 one of a box that does not exist": (
        [LEFT, RIGHT, DRAWER, None],
        {"joint_f1": 6 / 7, "whole_object": 0, "joint_precision": 0.75},
        (0, 1),
    ),
    "8 one missing and one of a box that does not exist": (
        [LEFT, RIGHT, None],
        {**ONE_WRONG, "axis_within_5_degrees_with_sign": TWO_THIRDS, "axis_within_5_degrees": TWO_THIRDS,
         "type": TWO_THIRDS},
        (1, 1),
    ),
    "9 none": ([], dict.fromkeys([name for name in ALL if name != "root"], 0), (3, 0)),
    "10 opens to the other side": (
        [hinge(1, -0.3, 0.4), RIGHT, DRAWER],
        {**ONE_WRONG, "axis_within_5_degrees_with_sign": TWO_THIRDS},
        (0, 0),
    ),
    "11 a drawer pushed in": ([LEFT, RIGHT, slide(3, (1, 0, 0))],
                              {**ONE_WRONG, "axis_within_5_degrees_with_sign": TWO_THIRDS}, (0, 0)),
    "12 a drawer as a hinge: its line counts nowhere": (
        [LEFT, RIGHT, hinge(3, -0.3, 0, (-1, 0, 0))],
        {**ONE_WRONG, "type": TWO_THIRDS},
        (0, 0),
    ),
    "13 a door as a slide": (
        [slide(1, (0, 0, -1)), RIGHT, DRAWER],
        {**ONE_WRONG, "edge": 0.5, "line_within_5_cm": 0.5, "type": TWO_THIRDS},
        (0, 0),
    ),
    "14 a parallel line 4 cm beside it": ([hinge(1, -0.3, 0.36, (0, 0, -1)), RIGHT, DRAWER], {}, (0, 0)),
    "15 a parallel line 6 cm beside it": (
        [hinge(1, -0.3, 0.34, (0, 0, -1)), RIGHT, DRAWER], {**ONE_WRONG, "line_within_5_cm": 0.5}, (0, 0)),
    "16 at the door's other side: parallel, 40 cm apart, another edge": (
        [hinge(1, -0.3, 0, (0, 0, -1)), RIGHT, DRAWER],
        {**ONE_WRONG, "edge": 0.5, "line_within_5_cm": 0.5},
        (0, 0),
    ),
    "17 the thin box's other edge: 4 cm apart": (
        [hinge(1, -0.34, 0.4, (0, 0, -1)), RIGHT, DRAWER], {"edge": 0.5}, (0, 0)),
    "18 tilted by 4 degrees": ([LEFT, hinge(2, -0.3, -0.4, tilted(4)), DRAWER], {}, (0, 0)),
    "19 tilted by 6 degrees": (
        [LEFT, hinge(2, -0.3, -0.4, tilted(6)), DRAWER],
        {**ONE_WRONG, "axis_within_5_degrees_with_sign": TWO_THIRDS, "axis_within_5_degrees": TWO_THIRDS},
        (0, 0),
    ),
    "20 across: the line goes through the true one, 90 degrees off": (
        [LEFT, hinge(2, -0.3, -0.4, (0, 1, 0)), DRAWER],
        {**ONE_WRONG, "edge": 0.5, "axis_within_5_degrees_with_sign": TWO_THIRDS, "axis_within_5_degrees": TWO_THIRDS},
        (0, 0),
    ),
    "21 both doors' joints changed: each is of the wrong door": (
        [hinge(1, -0.3, -0.4), hinge(2, -0.3, 0.4, (0, 0, -1)), DRAWER],
        {"joint_f1": THIRD, "whole_object": 0, "joint_precision": THIRD, "joint_recall": THIRD, "edge": 0,
         "line_within_5_cm": 0, "axis_within_5_degrees_with_sign": THIRD},
        (0, 0),
    ),
    "22 the right joint on another box: its partner, but not right": (
        [LEFT, RIGHT, slide(0)], ONE_WRONG, (0, 0)),
    "23 all wrong: two edges, two signs, a type": (
        [hinge(1, -0.3, 0), hinge(2, -0.3, 0, (0, 0, -1)), hinge(3, 0.5, 0.5)],
        {"joint_f1": 0, "whole_object": 0, "joint_precision": 0, "joint_recall": 0, "edge": 0, "line_within_5_cm": 0,
         "axis_within_5_degrees_with_sign": 0, "axis_within_5_degrees": TWO_THIRDS, "type": TWO_THIRDS},
        (0, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_case_worked_by_hand(name: str) -> None:
    predicted, different, (missing, extra) = CASES[name]
    found = compare(predicted, TRUE, BOXES)
    assert metrics(found) == pytest.approx({**ALL, **different})
    assert (found.missing_count, found.extra_count) == (missing, extra)


def test_the_root_counts_only_for_the_whole_object() -> None:
    assert metrics(compare(TRUE, TRUE, BOXES, root=False)) == pytest.approx({**ALL, "root": 0, "whole_object": 0})


def test_an_object_without_hinges_is_not_scored_by_lines() -> None:
    assert set(ALL) - set(metrics(compare([DRAWER], [DRAWER], BOXES))) == {"edge", "line_within_5_cm"}


def test_the_assignment_is_optimal_and_not_greedy() -> None:
    """Of the lines at y = 0.1 and y = -0.2 the first is nearest to both true ones, at y = 0 and y = 0.25: 0.1 + 0.45 in
    all if the first true one takes it, 0.2 + 0.15 if the second does."""
    true = [hinge(1, -0.3, 0), hinge(2, -0.3, 0.25)]
    predicted = [hinge(1, -0.3, 0.1), hinge(1, -0.3, -0.2), hinge(1, -0.3, 3)]
    found = compare(predicted, true, BOXES)
    assert list(found.partner) == [1, 0] and found.extra_count == 1
    assert [pair and pair.distance for pair in found.pairs] == pytest.approx([0.2, 0.15])


# -- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "metres"),
    [
        (hinge(2, -0.3, -0.4, z=77), 0),  # the same line
        (hinge(2, -0.3, -0.4, (0, 0, -1)), 0),  # the other way
        (hinge(2, 0, 0), 0.5),  # parallel: 3-4-5
        (hinge(2, 0, 0, (0, 0, -1)), 0.5),
        (hinge(2, -0.3, -0.3, (1, 0, 0)), 0.1),  # across, in front of the middle of the box
        (hinge(2, -0.3, -0.3, (1, 0, 0), z=1.6), math.hypot(0.1, 1)),  # across it, a metre above
    ],
)
def test_distance_of_lines_at_the_part(other: Joint, metres: float) -> None:
    assert line_distance(RIGHT, other, BOXES[2].center) == pytest.approx(metres)


def test_nearly_parallel_lines_are_as_far_apart_as_they_are_at_the_part() -> None:
    """10 cm apart, a hundredth of a degree from parallel: they cross 570 m away, which does not matter to the door."""
    degrees = 0.01
    axis = (0, math.sin(math.radians(degrees)), math.cos(math.radians(degrees)))
    other = hinge(2, -0.3, -0.3, axis)
    across = np.cross(RIGHT.axis, other.axis)
    shortest = abs((other.pos - RIGHT.pos) @ across) / np.linalg.norm(across)
    assert shortest == pytest.approx(0, abs=1e-9)
    assert line_distance(RIGHT, other, BOXES[2].center) == pytest.approx(0.1, abs=1e-6)


# -- values with a unit ----------------------------------------------------------------------------------------------


def test_pairs_are_measured_in_degrees_and_centimetres_and_the_rest_is_counted() -> None:
    found = measures(compare([hinge(2, -0.3, -0.3, tilted(10)), hinge(1, -0.3, 0.4), slide(0)], TRUE, BOXES))
    assert found["axis angle, degrees"] == pytest.approx([0, 10, 0])
    assert found["axis angle with sign, degrees"] == pytest.approx([180, 10, 0])
    assert found["hinge line distance, cm"] == pytest.approx([0, 10 * math.cos(math.radians(10))])
    assert (found["missing joints"], found["extra joints"]) == ([0], [0])
    assert measures(compare([], TRUE, BOXES))["missing joints"] == [3]


# -- the official rule -----------------------------------------------------------------------------------------------

OFFICIAL: dict[str, tuple[Joint, Joint, OfficialError]] = {
    "the same": (LEFT, LEFT, OfficialError(1, 0, 0)),
    "the sign is never scored": (hinge(1, -0.3, 0.4), LEFT, OfficialError(1, 0, 0)),
    "a wrong type has no other error": (slide(1, (0, 0, -1)), LEFT, OfficialError(0)),
    "a slide has no position": (slide(3, (0, 1, 0)), DRAWER, OfficialError(1, 90)),
    "lines across": (hinge(2, -0.3, -0.3, (1, 0, 0)), RIGHT, OfficialError(1, 90, 0.1)),
    "parallel: only y is measured": (hinge(2, -0.3, -0.1), RIGHT, OfficialError(1, 0, 0.3)),
    "parallel and apart in x: reads 0": (hinge(2, 0.7, -0.4), RIGHT, OfficialError(1, 0, 0)),
    "parallel to x: only z is measured": (
        hinge(2, 0, 0, (1, 0, 0), z=0.2), hinge(2, 0, 0.5, (1, 0, 0), z=0.6), OfficialError(1, 0, 0.4)),
    "predicted along -x: no position": (hinge(2, 0, 0, (-1, 0, 0)), hinge(2, 0, 0.5, (1, 0, 0)), OfficialError(1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_errors_of_a_pair(name: str) -> None:
    predicted, true, expected = OFFICIAL[name]
    found = official_error(predicted, true)
    assert found.type == expected.type
    assert found.rotation == pytest.approx(expected.rotation) and found.position == pytest.approx(expected.position)


def test_the_official_rule_silently_drops_missing_and_extra_joints() -> None:
    assert [pair.type for pair in official_errors([DRAWER], TRUE)] == [0], "it is compared with the first true joint"
    assert [pair.type for pair in official_errors([LEFT], TRUE)] == [1], "one of three, without an error"
    assert official_errors([*TRUE, *[hinge(0, 5, 5)] * 3], TRUE) == [
        OfficialError(1, 0, 0), OfficialError(1, 0, 0), OfficialError(1, 0)]  # fmt: skip
    assert official_errors([], TRUE) == [OfficialError(0)] * 3, "only an empty answer is penalised"


def test_the_official_order_weighs_degrees_above_all() -> None:
    """A wrong type has no degrees, so it costs less than a right type 90 degrees off: 1/2 + 0 against 0 + 45."""
    true = [hinge(1, 0, 0), slide(3)]
    predicted = [hinge(1, 0, 0, (1, 0, 0)), slide(3)]
    found = official_errors(predicted, true)
    assert [pair.type for pair in found] == [0, 0]


def test_many_joints_are_ordered_without_trying_all_orders() -> None:
    true = [hinge(1, 0, 0.1 * place) for place in range(12)]
    found = official_errors(true[::-1], true)
    assert found == [OfficialError(1, 0, 0)] * 12


def test_with_many_joints_too_only_the_first_true_ones_are_compared() -> None:
    """The official rule zips orders of the predictions with the true joints. With 9 predictions for 10 joints, the last
    joint has no partner, and the first one, which was not predicted, has a wrong one."""
    true = [DRAWER, *[hinge(1, 0, 0.1 * place) for place in range(9)]]
    found = official_errors(true[1:], true)
    assert found == [OfficialError(0), *[OfficialError(1, 0, 0)] * 8]


def test_any_extra_prediction_may_be_dropped() -> None:
    true = [hinge(1, 0, 0.1 * place) for place in range(9)]
    assert official_errors([DRAWER, *true], true) == [OfficialError(1, 0, 0)] * 9


# -- through the task ------------------------------------------------------------------------------------------------


def recipe_with(*overrides: str) -> Recipe:
    return settle_recipe(load_recipe(RECIPE, "tiny", overrides), "articulation", REPOSITORY / "recipes" / "data")


REFERENCE = """root_geom = 0
child_joints = [
dict(box=1,type='hinge',idx=2,edge=[1, 1],sign=-1),
dict(box=3,type='slide',idx=0,edge=[1, 1],sign=-1),
]"""


def sample(name: str = "one") -> Sample:
    stated = [(1, LEFT), (3, DRAWER)]
    return {
        "id": name,
        "messages": [],
        "images": [],
        "references": [REFERENCE],
        "meta": {
            "group": name,
            "mode": "obb_rel",
            "boxes": {str(number): each.as_json() for number, each in BOXES.items()},
            "joints": [
                {"box": number, "type": joint.type, "pos": joint.pos.tolist(), "axis": joint.axis.tolist()}
                for number, joint in stated
            ],
        },
    }


def test_an_answer_is_scored_in_the_world() -> None:
    recipe = recipe_with()
    assert articulation.score(recipe, REFERENCE, sample()) == pytest.approx(ALL)
    other = REFERENCE.replace("edge=[1, 1],sign=-1),\ndict(box=3", "edge=[-1, 1],sign=-1),\ndict(box=3")
    found = articulation.score(recipe, other, sample())
    assert (found["edge"], found["line_within_5_cm"], found["joint_f1"]) == (0, 1, 1), (
        "the thin box's other edge, 4 cm off"
    )
    assert "official_type" not in found
    lost = REFERENCE.replace("box=3", "box=9")
    assert articulation.score(recipe, lost, sample())["joint_f1"] == 0.5
    assert articulation.facts(sample()) == {"labels_true_to_the_urdf": 1}


def test_facts_count_the_labels_that_a_box_cannot_express() -> None:
    askew = sample()
    askew["meta"]["joints"][0]["axis"] = list(tilted(10))
    assert articulation.facts(askew) == {"labels_true_to_the_urdf": 0.5}


def test_the_official_rule_is_optional() -> None:
    recipe = recipe_with("eval.scoring.official_joint_eval=true")
    fewer = REFERENCE.replace("dict(box=3,type='slide',idx=0,edge=[1, 1],sign=-1),\n", "").replace("sign=-1", "sign=1")
    found = articulation.score(recipe, fewer, sample())
    assert (found["official_type"], found["joint_recall"]) == (1, 0), (
        "one missing, one reversed: perfect by the official rule"
    )
    assert articulation.measures(recipe, fewer, sample())["official rotation error, degrees"] == [0]
    lost = REFERENCE.replace("box=3", "box=9")
    assert articulation.score(recipe, lost, sample())["official_type"] == 0, (
        "the original executes the code, which fails"
    )


def test_a_failed_answer_misses_all_joints_and_scores_zero() -> None:
    samples = [sample("one"), sample("two")]
    right = {**failed_prediction("one", ""), "answer": REFERENCE, "error": None}
    predictions: Any = {"base": [right, failed_prediction("two", "no code")]}
    recipe = recipe_with()
    scores = score_models(articulation, recipe, samples, predictions)
    assert scores.models["base"].values[:, :-1].tolist() == [[1] * 10, [0] * 10]
    found = measure_answers(articulation, recipe, scores)["base"]
    assert found["missing joints"] == Measure(2, 1, 1, 2)
    assert found["axis angle, degrees"] == Measure(2, 0, 0, 0), "only of predicted joints"
