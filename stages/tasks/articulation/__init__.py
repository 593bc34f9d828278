"""articulation: from the oriented boxes of an object's parts to code for its joints (Real2Code, Mandi et al. 2024).

Data folder, as the original lays it out:

    shape_output/{train,test}/<Type>/<object>/loop_<n>/obb_link_<k>.json       center, R (columns are axes), extent
    mobility_dataset_v2/{train,test}/<Type>/<object>/mobility.urdf              y up, as in PartNet-Mobility

Boxes are in world coordinates with z up, and joints are transformed into them. Box k belongs to link_<k>. Without
folders `train` and `test`, objects are held out by the recipe's fractions. All loops of an object fall into the same
split. Answers for a test object without a URDF are not scored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import Field

from stages.contract.errors import DataError
from stages.contract.files import digest_of
from stages.contract.recipe import Recipe, Section
from stages.contract.records import Meta, Prediction, Sample
from stages.tasks.articulation import grammar, prompts, scoring
from stages.tasks.articulation.drawing import draw
from stages.tasks.articulation.geometry import (
    HINGE,
    Box,
    Joint,
    Mode,
    angle,
    box_from,
    decode,
    encode,
    line_distance,
    rotation_about_z,
)
from stages.tasks.articulation.objects import BOXES, SOURCE, Object, ObjectQuestion, read_objects
from stages.tasks.common.default_prompts import SHARED, ask, narrowed_sample, passes, possible_prompts
from stages.tasks.common.default_results import asked_rows, score_notes, together, uploads
from stages.tasks.common.default_settings import (
    COMPONENTS,
    READS_CONVERSATIONS,
    READS_DOCUMENTS,
    READS_RECORDS,
    Passes,
)
from stages.tasks.common.reasoning import without_reasoning
from stages.tasks.task import Found, Skip


class ArticulationMeta(Meta):
    """Metadata of a sample."""

    mode: Mode
    boxes: dict[str, dict[str, Any]]
    """By box number."""
    joints: list[dict[str, Any]]
    """As the URDF states them."""


class Samples(Section):
    """Settings of `preprocess.samples`."""

    mode: Mode = Field(
        "obb_rel",
        description="How a joint is described: by a box edge (obb_rel), by a point relative to the box center"
        " (obb_rot), or in world coordinates (absolute)",
    )
    copies: int = Field(
        3, ge=0, description="Number of copies of each training sample, rotated about z and shifted at random"
    )
    offset: float = Field(0.3, ge=0, description="Largest shift of a copy along each axis, in metres")


class Scoring(Section):
    """Settings of `eval.scoring`."""

    official_joint_eval: bool = Field(
        False,
        description="Also score by the rule of Real2Code's eval_utils/joint_eval.py, for comparison with its figures",
    )


def sources(folder: Path) -> list[str]:
    """The name of the one data set, in a list. Raises DataError if it is missing."""
    if not (folder / BOXES).is_dir():
        raise DataError(f"{folder}: no folder {BOXES}; put the boxes there, one folder per object")
    return [SOURCE]


def read_questions(recipe: Recipe, folder: Path, documents: set[str], skip: Skip) -> list[ObjectQuestion]:
    """One question for each loop, with its label if it has a URDF. Unusable loops go to `skip`. Raises DataError if
    none is usable."""
    sources(folder)
    mode = _sample_settings(recipe).mode
    found = read_objects(folder, skip)
    return [one if one.view.root is None else replace(one, answers=(label(one.view, mode),)) for one in found]


def prompt_boxes(boxes: Mapping[int, Box], mode: Mode) -> dict[int, Box]:
    """The boxes as a prompt of this mode lists them: in `obb_rot` with ordered axes."""
    return {number: box.with_ordered_axes() if mode == "obb_rot" else box for number, box in boxes.items()}


def label(view: Object, mode: Mode) -> str:
    """The code to learn: the root and the joints, ordered by box. `view` must have a root."""
    assert view.root is not None
    boxes = prompt_boxes(view.boxes, mode)
    return grammar.joints_code(view.root, [encode(one, boxes[number], mode) for number, one in view.joints.items()])


def build_samples(recipe: Recipe, question: ObjectQuestion, found: Found | None, split: str) -> list[Sample]:
    """The sample of a loop; in training also its augmented copies, with labels encoded from the rotated joints."""
    settings = _sample_settings(recipe)
    samples = [_sample(question, question.view, settings.mode, question.id)]
    for number in range(1, settings.copies + 1 if split == "train" else 1):
        name = f"{question.id}#{number}"
        random = np.random.default_rng(int(digest_of([recipe.seed, name])[:16], 16))
        turn = rotation_about_z(random.uniform(-np.pi, np.pi))
        view = question.view.moved_copy(turn, random.uniform(-settings.offset, settings.offset, 3))
        samples.append(_sample(question, view, settings.mode, name))
    return samples


def _sample(question: ObjectQuestion, view: Object, mode: Mode, name: str) -> Sample:
    """The sample of one view of an object. `name` is its id."""
    boxes = prompt_boxes(view.boxes, mode)
    meta: ArticulationMeta = {
        "group": question.group,
        "source": question.source,
        "kind": question.kind,
        "question": question.text,
        "mode": mode,
        "boxes": {str(number): box.as_json() for number, box in boxes.items()},
        "joints": [_joint_record(view, joint) for joint in view.joints.values()],
    }
    return {
        "id": name,
        "messages": prompts.joints_prompt(boxes, mode),
        "images": [],
        "references": [label(view, mode)] if view.root is not None else [],
        "meta": meta,
    }


def _joint_record(view: Object, joint: Joint) -> dict[str, Any]:
    """A joint for the metadata: the exact values behind its label, and the two that the label leaves out, `parent` and
    `range`. Position and axis are in the frame of `view`."""
    nested = view.nested[joint.box]
    return {
        "box": joint.box,
        "type": joint.type,
        "pos": joint.pos.tolist(),
        "axis": joint.axis.tolist(),
        "parent": nested.parent,
        "range": nested.range,
    }


def read_answer(text: str, sample: Sample) -> str | None:
    """The code in a completion, formatted like a label; None without complete and valid code."""
    code = grammar.find_code(without_reasoning(text), _meta(sample)["mode"])
    return grammar.joints_code(code.root, code.joints) if code is not None else None


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """A line with the loop's id and its code. The code is empty if there is no answer."""
    prediction = predictions.get(row["id"])
    return {"id": row["id"], "code": (prediction["answer"] if prediction else None) or ""}


# -- scores --------------------------------------------------------------------------------------------------------


def score(recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
    """Metrics of the answer's joints against the label's, in world coordinates; see `scoring.metrics`. With
    `official_joint_eval`, also `official_type`: the share of right types by Real2Code's rule."""
    predicted, true, found = _compare(answer, sample)
    values = scoring.metrics(found)
    if _scoring_settings(recipe).official_joint_eval:
        pairs = scoring.official_errors(_official_joints(predicted), true)
        values["official_type"] = sum(pair.type for pair in pairs) / len(pairs)
    return values


def measures(recipe: Recipe, answer: str | None, sample: Sample) -> dict[str, list[float]]:
    """Angles (degrees), distances (cm) and counts of joints of an answer, by name. Without an answer there are only
    counts, and all joints count as missing."""
    if answer is None:
        return {"missing joints": [float(len(_root_and_joints(sample)[1]))], "extra joints": [0.0]}
    predicted, true, found = _compare(answer, sample)
    values = scoring.measures(found)
    if _scoring_settings(recipe).official_joint_eval:
        values |= scoring.official_measures(scoring.official_errors(_official_joints(predicted), true))
    return values


def facts(sample: Sample) -> dict[str, float]:
    """The share (0..1) of the URDF's joints that the label itself reproduces within the limits of a right joint.

    If boxes are rough, or rotated against the joints, no answer can do better.
    """
    boxes = _boxes(sample)
    _, labelled = _root_and_joints(sample)
    accurate = []
    for stated, joint in zip(_meta(sample)["joints"], labelled, strict=True):
        true = Joint(stated["box"], stated["type"], np.array(stated["pos"]), np.array(stated["axis"]))
        near = true.type != HINGE or line_distance(true, joint, boxes[true.box].center) <= scoring.METRES
        accurate.append(near and angle(true.axis, joint.axis, signed=True) <= scoring.DEGREES)
    return {"labels_true_to_the_urdf": sum(accurate) / len(accurate)}


def picture(recipe: Recipe, sample: Sample, prediction: Prediction | None) -> str | None:
    """An SVG of the boxes with the label's joints and, beside them, with the answer's joints, if there is an answer."""
    boxes, (root, true) = _boxes(sample), _root_and_joints(sample)
    answer = prediction["answer"] if prediction else None
    if answer is None:
        return draw(boxes, root, true)
    predicted, _, found = _compare(answer, sample)
    return draw(boxes, root, true, predicted, found, grammar.parse(answer, _meta(sample)["mode"]).root)


def _compare(answer: str, sample: Sample) -> tuple[list[Joint | None], list[Joint], scoring.Comparison]:
    """The joints of an answer, None for each whose box does not exist; the joints of the label; and how both are
    paired."""
    boxes, (root, true) = _boxes(sample), _root_and_joints(sample)
    code = grammar.parse(answer, _meta(sample)["mode"])
    predicted = _decode_joints(code, boxes, _meta(sample)["mode"])
    return predicted, true, scoring.compare(predicted, true, boxes, code.root == root)


def _official_joints(predicted: Sequence[Joint | None]) -> list[Joint]:
    """The joints that the official rule scores; none if one has an unknown box, because the original fails on it."""
    known = [joint for joint in predicted if joint is not None]
    return known if len(known) == len(predicted) else []


def _root_and_joints(sample: Sample) -> tuple[int, list[Joint]]:
    """The root in a sample's label, and the label's joints in world coordinates."""
    mode, boxes = _meta(sample)["mode"], _boxes(sample)
    code = grammar.parse(sample["references"][0], mode)
    return code.root, [decode(joint, boxes[joint["box"]], mode) for joint in code.joints]


def _decode_joints(code: grammar.Code, boxes: Mapping[int, Box], mode: Mode) -> list[Joint | None]:
    """The joints of a code in world coordinates; None for each whose box does not exist."""
    return [decode(one, boxes[one["box"]], mode) if one["box"] in boxes else None for one in code.joints]


def _boxes(sample: Sample) -> dict[int, Box]:
    """The boxes of a sample by number."""
    return {int(number): box_from(box) for number, box in _meta(sample)["boxes"].items()}


def _meta(sample: Sample) -> ArticulationMeta:
    """The metadata of a sample, with the keys of this task."""
    return cast(ArticulationMeta, sample["meta"])


def _sample_settings(recipe: Recipe) -> Samples:
    """The settings of `preprocess.samples`."""
    return Samples.model_validate(recipe.preprocess.samples)


def _scoring_settings(recipe: Recipe) -> Scoring:
    """The settings of `eval.scoring`."""
    return Scoring.model_validate(recipe.eval.scoring)
