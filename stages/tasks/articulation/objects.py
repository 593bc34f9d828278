"""The data folder: the boxes in each loop of an object, and the joints that its URDF states for them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stages.contract.errors import DataError
from stages.tasks.articulation.geometry import Array, Box, Joint, box_from
from stages.tasks.articulation.urdf import Mobility, UrdfJoint, read_urdf
from stages.tasks.common.json_lines import BadRecordError, object_of
from stages.tasks.common.skips import Skips
from stages.tasks.task import Given, Skip

SOURCE = "objects"
"""The name of the one data set."""
BOXES, URDFS = "shape_output", "mobility_dataset_v2"


@dataclass(frozen=True)
class Nested:
    """What the URDF states about a joint and its label does not."""

    parent: int | None
    """Box of the part that carries the joint; None if that part has no box."""
    range: tuple[float, float] | None
    """Joint limits in radians or metres; None if the URDF states none."""


@dataclass(frozen=True, eq=False)
class Object:
    """One loop, which is one view of an object: its boxes and joints in one frame."""

    boxes: dict[int, Box]
    root: int | None
    """The box that does not move; None without a URDF, and then there are no joints."""
    joints: dict[int, Joint]
    """By box number."""
    nested: dict[int, Nested]

    def moved_copy(self, turn: Array, offset: Array) -> "Object":
        """The object rotated by `turn` (3, 3), then shifted by `offset` (3)."""
        return replace(
            self,
            boxes={number: box.moved_copy(turn, offset) for number, box in self.boxes.items()},
            joints={number: joint.moved_copy(turn, offset) for number, joint in self.joints.items()},
        )


@dataclass(frozen=True, eq=False)
class ObjectQuestion:
    """A loop: the model is asked for its joints."""

    id: str
    """`<Type>_<object>_loop_<n>`, as the original names it."""
    kind: str
    """The object's type, such as StorageFurniture."""
    group: str
    """The object, because all its loops have the same joints."""
    view: Object
    split: Given | None
    answers: tuple[str, ...] = ()
    source: str = SOURCE

    @property
    def text(self) -> str:
        """The loop's name, its number of boxes, and how many of them may move."""
        moving = len(self.view.boxes) - 1
        return f"{self.id.replace('_', ' ')}: {len(self.view.boxes)} boxes, at most {moving} of which move"


def read_objects(folder: Path, skip: Skip) -> list[ObjectQuestion]:
    """All usable loops, those of the test folder first. Unusable ones go to `skip`. Raises DataError if none is usable.

    Without folders `train` and `test`, objects are directly in shape_output/ and mobility_dataset_v2/.
    """
    skip = Skips(skip)
    found: dict[str, ObjectQuestion] = {}
    for split in _split_folders(folder):
        for loop in _loops(folder / BOXES / split):
            try:
                question = _question(folder, split, loop, skip)
            except BadRecordError as error:
                skip(str(loop.relative_to(folder)), error.reason, str(error))
                continue
            if question.id in found:
                skip(str(loop.relative_to(folder)), "also in the test folder", question.id)
                continue
            found[question.id] = question
    if not found:
        raise DataError(f"{folder}: no usable loop in {BOXES}/ with a mobility.urdf in {URDFS}/; {skip.why}")
    scored = any(question.split == "test" for question in found.values())
    return [question if scored or question.split != "train" else replace(question, split=None)
            for question in found.values()]  # fmt: skip


def _split_folders(folder: Path) -> list[str]:
    """The folders `test` and `train` that exist; the folder itself (`.`) if neither does."""
    given = [name for name in ("test", "train") if (folder / BOXES / name).is_dir()]
    return given or ["."]


def _loops(folder: Path) -> Iterator[Path]:
    """The folders `<Type>/<object>/loop_<n>`, sorted by type, object and loop, with numbers by their value."""
    found = [path for path in folder.glob("*/*/loop_*") if path.is_dir() and not path.parts[-3].startswith(".")]
    return iter(sorted(found, key=lambda path: [_natural_sort_key(part) for part in path.parts[-3:]]))


def _natural_sort_key(text: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in a text by their value."""
    return [(int(part), "") if part.isascii() and part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _question(folder: Path, split: str, loop: Path, skip: Skip) -> ObjectQuestion:
    """The question of a loop, without its label. Joints of links without a box go to `skip`. Raises BadRecordError if
    the loop is unusable. A loop without a mobility.urdf is usable only in the test folder."""
    kind, name = loop.parts[-3:-1]
    boxes = _boxes(loop)
    urdf = folder / URDFS / split / kind / name / "mobility.urdf"
    given: Given | None = {"test": "test", "train": "train"}.get(split)  # type: ignore[assignment]
    question = f"{kind}_{name}_{loop.name}"
    if not urdf.is_file():
        if split != "test":
            raise BadRecordError("no mobility.urdf", str(urdf.relative_to(folder)))
        return ObjectQuestion(question, kind, f"{kind} {name}", Object(boxes, None, {}, {}), "asked")
    view = _with_joints(boxes, read_urdf(urdf), str(loop.relative_to(folder)), skip)
    return ObjectQuestion(question, kind, f"{kind} {name}", view, given)


# -- boxes ---------------------------------------------------------------------------------------------------------


def _boxes(loop: Path) -> dict[int, Box]:
    """The boxes of obb_link_<k>.json by k. Raises BadRecordError for an unusable box, and for fewer than two boxes."""
    found = {}
    for path in loop.glob("obb_link_*.json"):
        number = re.fullmatch(r"obb_link_(\d{1,4})\.json", path.name)
        if number is None:
            raise BadRecordError("box without a number", path.name)
        try:
            found[int(number[1])] = box_in(object_of(path.read_bytes()))
        except BadRecordError as error:
            raise BadRecordError(error.reason, f"{path.name}: {error}") from error
    if len(found) < 2:
        raise BadRecordError("fewer than two boxes", f"found {len(found)}")
    return dict(sorted(found.items()))


def box_in(record: dict[str, Any]) -> Box:
    """The box of an OBB file: `center` [3], `R` [3x3] whose columns are its axes, and `extent` [3], full lengths.

    Accepts axes rounded to one decimal, as the original writes them, and left-handed axes. Raises BadRecordError for
    another form.
    """
    for key, shape in (("center", (3,)), ("R", (3, 3)), ("extent", (3,))):
        value = record.get(key)
        if not _is_numbers(value, shape):
            raise BadRecordError(f"{key} is not {'x'.join(map(str, shape))} numbers", json.dumps(value)[:100])
    box = box_from(record)
    if not (box.extent > 0).all():
        raise BadRecordError("extent is not positive", json.dumps(record["extent"]))
    lengths = np.linalg.norm(box.rotation, axis=0)
    if not (np.abs(lengths - 1) < 0.2).all() or not 0.5 < abs(np.linalg.det(box.rotation)) < 1.5:
        raise BadRecordError("R is not a rotation", json.dumps(record["R"])[:100])
    return box


def _is_numbers(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a value is nested lists of this shape with numbers below a million. NumPy would raise for ragged
    lists."""
    if not shape:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6
    return isinstance(value, list) and len(value) == shape[0] and all(_is_numbers(each, shape[1:]) for each in value)


# -- joints --------------------------------------------------------------------------------------------------------


def _with_joints(boxes: dict[int, Box], mobility: Mobility, where: str, skip: Skip) -> Object:
    """An object with its boxes and joints matched by link number.

    Links that are fixed to each other form one body. One box stands for each body: the box of the link that the joint
    moves, or else the largest. The root is the box of the body that no joint moves, whatever its number. A body that
    moves and has no box has no label, and goes to `skip`. Raises BadRecordError if a box has no link, if the body that
    does not move has no box, and if nothing with a box moves.
    """
    bodies: dict[str, list[int]] = {mobility.body_link(link): [] for link in (mobility.root, *mobility.joints)}
    for number in boxes:
        if f"link_{number}" not in mobility.joints and f"link_{number}" != mobility.root:
            raise BadRecordError("box of a link that is not in mobility.urdf", f"link_{number}")
        bodies[mobility.body_link(f"link_{number}")].append(number)
    box_of: dict[str, int] = {}
    for body, numbers in bodies.items():
        own = [number for number in numbers if body == f"link_{number}"]
        if numbers:
            box_of[body] = (own or sorted(numbers, key=lambda number: -float(np.prod(boxes[number].extent))))[0]
        elif body != mobility.root:
            skip(f"{where}, {body}", "joint of a link without a box")
    if mobility.root not in box_of:
        raise BadRecordError("no box for the part that does not move")
    moving = sorted((number, mobility.joints[body]) for body, number in box_of.items() if body != mobility.root)
    if not moving:
        raise BadRecordError("nothing moves")
    parents = {number: box_of.get(mobility.body_link(joint.parent)) for number, joint in moving}
    return Object(
        boxes,
        box_of[mobility.root],
        {number: _joint(number, joint) for number, joint in moving},
        {number: Nested(parents[number], joint.range) for number, joint in moving},
    )


def _joint(number: int, joint: UrdfJoint) -> Joint:
    """The joint of box `number`."""
    assert joint.type is not None  # a fixed joint moves no body
    return Joint(number, joint.type, joint.pos, joint.axis)
