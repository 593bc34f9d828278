"""Oriented boxes, joints, and how a joint is told by its box: the label rules of Real2Code (Mandi et al. 2024).

Lengths are metres, the world's z is up. A box's edge is written as two signs, those of the two axes that it does not
run along: its middle is `center + R @ (signs * extent / 2)` with 0 for the axis that it runs along.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mode = Literal["obb_rel", "obb_rot", "absolute"]
"""How a joint is told: by an edge of its box (`obb_rel`), by a place relative to its center (`obb_rot`), or by place
and axis in the world (`absolute`)."""

HINGE, SLIDE = "hinge", "slide"
EDGES = ((1, 1), (1, -1), (-1, 1), (-1, -1))
PERMUTATIONS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True, eq=False)
class Box:
    """An oriented box. The columns of `rotation` are its axes; they may be rounded, and left-handed."""

    center: Array
    rotation: Array
    extent: Array
    """Full lengths."""

    def axis(self, idx: int) -> Array:
        """Unit vector."""
        column = self.rotation[:, idx]
        return np.asarray(column / np.linalg.norm(column))

    def edge(self, idx: int, edge: Sequence[int]) -> Array:
        """The middle of the edge along axis `idx` with these signs."""
        return np.asarray(self.center + self.rotation @ (np.insert(np.array(edge, float), idx, 0.0) * self.extent / 2))

    def corners(self) -> Array:
        """(8, 3), by x, y, z of the box in turn."""
        signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], float)
        return np.asarray(self.center + (signs * self.extent / 2) @ self.rotation.T)

    def moved(self, turn: Array, offset: Array) -> "Box":
        return Box(turn @ self.center + offset, turn @ self.rotation, self.extent)

    def ordered(self) -> "Box":
        """The same box with its axes in that order in which each is nearest to the world's axis of its number."""
        best = max(PERMUTATIONS, key=lambda order: sum(abs(self.rotation[i, column]) for i, column in enumerate(order)))
        return Box(self.center, self.rotation[:, best], self.extent[list(best)])

    def as_json(self) -> dict[str, Any]:
        return {"center": self.center.tolist(), "R": self.rotation.tolist(), "extent": self.extent.tolist()}


def box_from(value: Mapping[str, Any]) -> Box:
    return Box(*(np.array(value[key], float) for key in ("center", "R", "extent")))


@dataclass(frozen=True, eq=False)
class Joint:
    """A joint in the world."""

    box: int
    type: str
    """`hinge` or `slide`."""
    pos: Array
    """A point of its axis; of a slide it says nothing."""
    axis: Array
    """Unit vector; a part opens to its positive side."""

    def moved(self, turn: Array, offset: Array) -> "Joint":
        return replace(self, pos=turn @ self.pos + offset, axis=turn @ self.axis)


def about_z(angle: float) -> Array:
    """(3, 3): turns by an angle in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


# -- labels --------------------------------------------------------------------------------------------------------


def encode(joint: Joint, box: Box, mode: Mode) -> dict[str, Any]:
    """A joint as its label has it; in `obb_rot` the box must be `ordered`.

    `idx` is the box's axis with the least angle to the joint's, `sign` its direction. For `obb_rel` the nearest corner
    edge is that nearest to the joint's line. `obb_rot` keeps two of the three world coordinates from the box's center
    to the joint: it takes that point of the line of which the third is 0, so that none is lost where box and world are
    turned against each other. `absolute` takes the point nearest to the center: its axis is rounded, and what that
    costs grows with the distance. A slide has no place: its edge is constant, its position the center.
    """
    along = [float(box.axis(idx) @ joint.axis) for idx in range(3)]
    idx = int(np.argmax(np.abs(along)))
    common = {"box": joint.box, "type": joint.type}
    place = nearest(joint, box.center) if joint.type == HINGE else box.center
    if mode == "absolute":
        # one decimal, as the original has it, is up to 4 degrees off
        return common | {"pos": rounded(place), "axis": rounded(joint.axis)}
    sign = 1 if along[idx] > 0 else -1
    edge: list[Any] = [1, 1]
    if mode == "obb_rot":
        offset = place - box.center
        flat = offset - joint.axis * (offset[idx] / joint.axis[idx]) if abs(joint.axis[idx]) > 0.1 else offset
        edge = rounded(np.delete(flat, idx)) if joint.type == HINGE else [0.0, 0.0]
    elif joint.type == HINGE:
        apart = [distance(joint, box.edge(idx, signs)) for signs in EDGES]
        edge = list(EDGES[apart.index(min(apart))])
    return common | {"idx": idx, "edge": edge, "sign": sign}


def decode(label: Mapping[str, Any], box: Box, mode: Mode) -> Joint:
    """The joint that a label means; in `obb_rot` the box must be `ordered`."""
    box_id, kind = label["box"], label["type"]
    if mode == "absolute":
        axis = np.array(label["axis"], float)
        return Joint(box_id, kind, np.array(label["pos"], float), axis / np.linalg.norm(axis))
    idx, (first, second) = label["idx"], label["edge"]
    if mode == "obb_rel":
        pos = box.edge(idx, (first, second))
    else:
        pos = box.center + np.insert(np.array([first, second], float), idx, 0)
    return Joint(box_id, kind, pos, box.axis(idx) * label["sign"])


def rounded(values: Array) -> list[float]:
    """To 2 decimals, without -0.0."""
    return [round(float(value), 2) + 0.0 for value in values]


# -- how far joints are apart ----------------------------------------------------------------------------------------


def angle(first: Array, second: Array, signed: bool) -> float:
    """Degrees between two unit vectors: 0 to 180, or 0 to 90 where the sign does not count."""
    cosine = float(first @ second)
    return float(np.degrees(np.arccos(np.clip(cosine if signed else abs(cosine), -1, 1))))


def nearest(joint: Joint, point: Array) -> Array:
    """The point of the joint's line that is nearest to a point."""
    return np.asarray(joint.pos + joint.axis * float(joint.axis @ (point - joint.pos)))


def distance(joint: Joint, point: Array) -> float:
    """Metres from a point to the joint's line."""
    return float(np.linalg.norm(nearest(joint, point) - point))


def line_distance(true: Joint, other: Joint, near: Array) -> float:
    """Metres between two joints' lines where the part is: from that point of the true line which is nearest to `near`,
    the center of its box, to the other line.

    For parallel lines it is their distance. The shortest distance between two lines would not do for others: lines that
    are nearly parallel come close far away from the object, those across each other anywhere.
    """
    return distance(other, nearest(true, near))


def edge_of(joint: Joint, box: Box) -> tuple[int, int, int]:
    """The corner edge of a box that a hinge is at: its axis and its two signs, in whichever way it was told."""
    label = encode(joint, box, "obb_rel")
    return label["idx"], *label["edge"]
