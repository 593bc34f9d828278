"""Joints of a mobility.urdf, transformed into the world coordinates of its boxes.

PartNet-Mobility's objects are y up. Its files rotate them upright by the fixed joint from `base`
(rpy 90, 0, -90 degrees), which maps (x, y, z) to (-z, -x, y), the world of the boxes. A file without that joint is
rotated in the same way here.
"""

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.tasks.articulation.geometry import HINGE, SLIDE, Array
from stages.tasks.common.encodings import decode
from stages.tasks.common.json_lines import BadRecordError

UPRIGHT = np.array([[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]])
"""World = UPRIGHT @ URDF."""

TYPES = {"revolute": HINGE, "continuous": HINGE, "prismatic": SLIDE}
"""The joint types that move and have a label; of the others only `fixed` is accepted."""

BELOW = 1e6
"""Bound for numbers, and for the positions composed from them; labels are read with the same bound."""


@dataclass(frozen=True, eq=False)
class UrdfJoint:
    """A joint between a link and its parent, at rest, in world coordinates."""

    child: str
    parent: str
    type: str | None
    """`hinge` or `slide`; None for a fixed joint."""
    pos: Array
    """Shape (3), in metres."""
    axis: Array
    """Unit vector (3); zeros for a fixed joint."""
    range: tuple[float, float] | None
    """Limits in radians or metres; None if the file states none."""


@dataclass(frozen=True)
class Mobility:
    """An object's links and joints."""

    root: str
    joints: dict[str, UrdfJoint]
    """By child link."""

    def body_link(self, link: str) -> str:
        """The link that stands for the rigid body of `link`: `link` itself or its nearest ancestor that a joint moves,
        or the root link if no joint moves any of them."""
        while link != self.root and self.joints[link].type is None:
            link = self.joints[link].parent
        return link


def read_urdf(path: Path) -> Mobility:
    """The links and joints of a URDF file. Raises BadRecordError if it is not XML, if its links do not form a tree, and
    for an unusable joint."""
    content = path.read_bytes()
    try:
        try:
            robot = ET.fromstring(content)
        except (ET.ParseError, ValueError, LookupError):  # such as GBK, which expat does not know
            robot = ET.fromstring(decode(content))
    except (ET.ParseError, ValueError) as error:
        raise BadRecordError("mobility.urdf is not XML", f"{path.name}: {error}") from error
    elements: dict[str, ET.Element] = {}
    for element in robot.findall("joint"):
        child = _link(element, "child")
        if child in elements:
            raise BadRecordError("mobility.urdf is not a tree", f"link {child!r} is the child of two joints")
        elements[child] = element
    parents = {child: _link(element, "parent") for child, element in elements.items()}
    roots = ({link.get("name", "") for link in robot.findall("link")} | {*parents.values()}) - {*parents}
    if len(roots) != 1 or not parents:
        raise BadRecordError("mobility.urdf is not a tree", f"links without a parent: {sorted(roots)}")
    return _compose(roots.pop(), parents, elements)


def _compose(root: str, parents: dict[str, str], elements: dict[str, ET.Element]) -> Mobility:
    """The object with all joints in world coordinates: their transforms are composed from the root to the leaves.
    Raises BadRecordError for joints that form a cycle, and for an unusable joint."""
    turns = {child: _transform(element) for child, element in elements.items()}
    upright = any(
        parents[child] == root and elements[child].get("type") == "fixed" and np.allclose(turn, UPRIGHT, atol=1e-3)
        for child, (turn, _) in turns.items()
    )
    frames: dict[str, tuple[Array, Array]] = {root: (np.eye(3) if upright else UPRIGHT, np.zeros(3))}
    joints: dict[str, UrdfJoint] = {}
    while len(joints) < len(elements):
        ready = [child for child in elements if child not in joints and parents[child] in frames]
        if not ready:
            raise BadRecordError("mobility.urdf is not a tree", "its joints form a cycle")
        for child in ready:
            turn, origin = frames[parents[child]]
            own_turn, own_origin = turns[child]
            frames[child] = turn @ own_turn, origin + turn @ own_origin
            joints[child] = _joint(elements[child], child, parents[child], *frames[child])
    return Mobility(root, joints)


def _joint(element: ET.Element, child: str, parent: str, turn: Array, pos: Array) -> UrdfJoint:
    """The joint of an element, in the frame with this rotation and position. Raises BadRecordError if unusable."""
    kind = element.get("type", "")
    if kind not in TYPES and kind != "fixed":
        raise BadRecordError("unsupported joint type", f"{kind!r}; supported: fixed, {', '.join(TYPES)}")
    if kind == "fixed":
        return UrdfJoint(child, parent, None, pos, np.zeros(3), None)
    if not (np.abs(pos) < BELOW).all():
        raise BadRecordError("mobility.urdf: number not below a million", f"link {child!r} is at {pos.tolist()}")
    axis = np.array(_numbers(element.find("axis"), "xyz", (1.0, 0.0, 0.0)))
    if not np.linalg.norm(axis) > 1e-6:
        raise BadRecordError("joint without an axis", f"of link {child!r}")
    limit = element.find("limit")
    limits = None
    if limit is not None and kind != "continuous":
        lower, upper = (_number(limit.get(end, "").strip() or "0", end) for end in ("lower", "upper"))
        limits = (lower, upper)
    return UrdfJoint(child, parent, TYPES[kind], pos, turn @ axis / np.linalg.norm(axis), limits)


def _transform(element: ET.Element) -> tuple[Array, Array]:
    """A joint's rotation (3, 3) and offset (3) in metres. `rpy` (radians) rotates about the fixed x, then y, then z."""
    origin = element.find("origin")
    roll, pitch, yaw = _numbers(origin, "rpy", (0.0, 0.0, 0.0))
    about_x = np.array([[1, 0, 0], [0, math.cos(roll), -math.sin(roll)], [0, math.sin(roll), math.cos(roll)]])
    about_y = np.array([[math.cos(pitch), 0, math.sin(pitch)], [0, 1, 0], [-math.sin(pitch), 0, math.cos(pitch)]])
    about_z = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x, np.array(_numbers(origin, "xyz", (0.0, 0.0, 0.0)))


def _link(element: ET.Element, end: str) -> str:
    """The name of the link at an end of a joint, `parent` or `child`. Raises BadRecordError without one."""
    found = element.find(end)
    name = found.get("link") if found is not None else None
    if not name:
        raise BadRecordError(f"joint without a {end}", element.get("name", ""))
    return name


def _numbers(element: ET.Element | None, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """The three numbers of an attribute; the default if it is missing or blank. Raises BadRecordError for anything
    else."""
    text = element.get(key) if element is not None else None
    if text is None or not text.strip():
        return default
    values = tuple(_number(word, key) for word in text.split())
    if len(values) != 3:
        raise BadRecordError("mobility.urdf: not three numbers", f"{key}={text!r}"[:100])
    return values


def _number(word: str, key: str) -> float:
    """A number as XML writes it. Raises BadRecordError for another text, and for magnitudes
    of a million and above."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", word):
        raise BadRecordError("mobility.urdf: not a number", f"{key}: {word!r}"[:100])
    value = float(word)
    if not abs(value) < BELOW:
        raise BadRecordError("mobility.urdf: number not below a million", f"{key}: {word!r}"[:100])
    return value
