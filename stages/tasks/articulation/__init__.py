"""articulation: from the oriented boxes of an object's parts to code for its joints (Real2Code, Mandi et al. 2024).

Data folder, as the original lays it out:

    shape_output/{train,test}/<Type>/<object>/loop_<n>/obb_link_<k>.json       center, R (columns are axes), extent
    mobility_dataset_v2/{train,test}/<Type>/<object>/mobility.urdf              y up, as PartNet-Mobility's

Boxes are in a world with z up, into which the joints are put; box k is that of link_<k>. Without folders `train` and
`test` objects are held out by the recipe's fractions. All loops of an object fall into the same split. An object of the
test folder without a URDF is asked only.
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
    about_z,
    angle,
    box_from,
    decode,
    encode,
    line_distance,
)
from stages.tasks.articulation.objects import BOXES, SOURCE, Object, ObjectQuestion, read_objects
from stages.tasks.common.defaults import (
    COMPONENTS,
    READS_DOCUMENTS,
    READS_RECORDS,
    SHARED,
    Passes,
    ask,
    asked_rows,
    narrowed,
    passes,
    rehearsal,
    together,
    uploads,
)
from stages.tasks.task import Found, Skip


class ArticulationMeta(Meta):
    mode: Mode
    boxes: dict[str, dict[str, Any]]
    """By number."""
    joints: list[dict[str, Any]]
    """As the URDF has them."""


class Samples(Section):
    """`preprocess.samples`."""

    mode: Mode = Field("obb_rel", description="How a joint is told: by an edge of its box, by a place, or in the world")
    copies: int = Field(3, ge=0, description="Turned copies of each training sample: about z, and moved")
    offset: float = Field(0.3, ge=0, description="Metres along each axis that a copy is moved at most")


class Scoring(Section):
    """`eval.scoring`."""

    official_joint_eval: bool = Field(
        False, description="Also the rule of Real2Code's eval_utils/joint_eval.py, for figures to set beside its own"
    )


def sources(folder: Path) -> list[str]:
    """The one data set. Raises DataError where there is none."""
    if not (folder / BOXES).is_dir():
        raise DataError(f"{folder}: nothing to train on: no folder {BOXES}")
    return [SOURCE]


def read_questions(recipe: Recipe, folder: Path, documents: set[str], skip: Skip) -> list[ObjectQuestion]:
    """One for each loop, with its label; what cannot be used goes to `skip`."""
    sources(folder)
    mode = _samples(recipe).mode
    found = read_objects(folder, skip)
    return [one if one.view.root is None else replace(one, answers=(label(one.view, mode),)) for one in found]


def shown(boxes: Mapping[int, Box], mode: Mode) -> dict[int, Box]:
    """The boxes as a prompt of this mode shows them."""
    return {number: box.ordered() if mode == "obb_rot" else box for number, box in boxes.items()}


def label(view: Object, mode: Mode) -> str:
    """The code to learn, joints by box."""
    assert view.root is not None
    boxes = shown(view.boxes, mode)
    return grammar.joints_code(view.root, [encode(one, boxes[number], mode) for number, one in view.joints.items()])


def build_samples(recipe: Recipe, question: ObjectQuestion, found: Found | None, split: str) -> list[Sample]:
    """The sample of a loop; in training its turned copies, too. Boxes and joints are turned together and told anew."""
    settings = _samples(recipe)
    samples = [_sample(question, question.view, settings.mode, question.id)]
    for number in range(1, settings.copies + 1 if split == "train" else 1):
        name = f"{question.id}#{number}"
        drawn = np.random.default_rng(int(digest_of([recipe.seed, name])[:16], 16))
        turn = about_z(drawn.uniform(-np.pi, np.pi))
        view = question.view.moved(turn, drawn.uniform(-settings.offset, settings.offset, 3))
        samples.append(_sample(question, view, settings.mode, name))
    return samples


def _sample(question: ObjectQuestion, view: Object, mode: Mode, name: str) -> Sample:
    boxes = shown(view.boxes, mode)
    meta: ArticulationMeta = {
        "group": question.group,
        "source": question.source,
        "kind": question.kind,
        "question": question.text,
        "mode": mode,
        "boxes": {str(number): box.as_json() for number, box in boxes.items()},
        "joints": [_kept(view, joint) for joint in view.joints.values()],
    }
    return {
        "id": name,
        "messages": prompts.joints_of(boxes, mode),
        "images": [],
        "references": [label(view, mode)] if view.root is not None else [],
        "meta": meta,
    }


def _kept(view: Object, joint: Joint) -> dict[str, Any]:
    """A joint as the URDF has it: what its label rounds, and what that has no place for."""
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
    """The code in a completion, written as a label is; None where none is whole and right."""
    code = grammar.find_code(text, _meta(sample)["mode"])
    return grammar.joints_code(code.root, code.joints) if code is not None else None


def submission(row: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> dict[str, Any]:
    """The loop and its code; empty where there is none."""
    prediction = predictions.get(row["id"])
    return {"id": row["id"], "code": (prediction["answer"] if prediction else None) or ""}


# -- scores --------------------------------------------------------------------------------------------------------


def score(recipe: Recipe, answer: str, sample: Sample) -> dict[str, float]:
    """The answer's joints beside the label's, both in the world; see `scoring.metrics`."""
    predicted, true, found = _compared(answer, sample)
    values = scoring.metrics(found)
    if _scoring(recipe).official_joint_eval:
        pairs = scoring.official_pairs(_official(predicted), true)
        values["official_type"] = sum(pair.type for pair in pairs) / len(pairs)
    return values


def measures(recipe: Recipe, answer: str | None, sample: Sample) -> dict[str, list[float]]:
    """Angles, distances and counts of an answer; of none, that all joints are missing."""
    if answer is None:
        return {"missing joints": [float(len(_label(sample)[1]))], "extra joints": [0.0]}
    predicted, true, found = _compared(answer, sample)
    values = scoring.measures(found)
    if _scoring(recipe).official_joint_eval:
        values |= scoring.official_measures(scoring.official_pairs(_official(predicted), true))
    return values


def facts(sample: Sample) -> dict[str, float]:
    """Of the joints that the URDF states, how many the label itself tells within what counts as right: boxes that are
    rough, or turned against the joints, leave no better answer."""
    boxes = _boxes(sample)
    _, labelled = _label(sample)
    fine = []
    for kept, joint in zip(_meta(sample)["joints"], labelled, strict=True):
        true = Joint(kept["box"], kept["type"], np.array(kept["pos"]), np.array(kept["axis"]))
        near = true.type != HINGE or line_distance(true, joint, boxes[true.box].center) <= scoring.METRES
        fine.append(near and angle(true.axis, joint.axis, signed=True) <= scoring.DEGREES)
    return {"labels_true_to_the_urdf": sum(fine) / len(fine)}


def picture(recipe: Recipe, sample: Sample, prediction: Prediction | None) -> str | None:
    """The boxes with the label's joints, and beside them with those of the answer, as SVG."""
    boxes, (root, true) = _boxes(sample), _label(sample)
    answer = prediction["answer"] if prediction else None
    if answer is None:
        return draw(boxes, root, true)
    predicted, _, found = _compared(answer, sample)
    return draw(boxes, root, true, predicted, found, grammar.parse(answer, _meta(sample)["mode"]).root)


def _compared(answer: str, sample: Sample) -> tuple[list[Joint | None], list[Joint], scoring.Comparison]:
    """The joints of an answer, None for each of a box that there is not, those of the label, and which belong
    together."""
    boxes, (root, true) = _boxes(sample), _label(sample)
    code = grammar.parse(answer, _meta(sample)["mode"])
    predicted = _decoded(code, boxes, _meta(sample)["mode"])
    return predicted, true, scoring.compare(predicted, true, boxes, code.root == root)


def _official(predicted: Sequence[Joint | None]) -> list[Joint]:
    """The original runs the code of an answer, and one with a box that there is not fails: no joint is left."""
    there = [joint for joint in predicted if joint is not None]
    return there if len(there) == len(predicted) else []


def _label(sample: Sample) -> tuple[int, list[Joint]]:
    mode, boxes = _meta(sample)["mode"], _boxes(sample)
    code = grammar.parse(sample["references"][0], mode)
    return code.root, [decode(joint, boxes[joint["box"]], mode) for joint in code.joints]


def _decoded(code: grammar.Code, boxes: Mapping[int, Box], mode: Mode) -> list[Joint | None]:
    return [decode(one, boxes[one["box"]], mode) if one["box"] in boxes else None for one in code.joints]


def _boxes(sample: Sample) -> dict[int, Box]:
    return {int(number): box_from(box) for number, box in _meta(sample)["boxes"].items()}


def _meta(sample: Sample) -> ArticulationMeta:
    return cast(ArticulationMeta, sample["meta"])


def _samples(recipe: Recipe) -> Samples:
    return Samples.model_validate(recipe.preprocess.samples)


def _scoring(recipe: Recipe) -> Scoring:
    return Scoring.model_validate(recipe.eval.scoring)
