"""Oriented boxes, joints, and the encoding of a joint by its box: the label rules of Real2Code (Mandi et al. 2024).

Lengths are in metres; the world's z points up. A box edge is written as two signs, one for each axis that it does not
run along. Its midpoint is `center + R @ (signs * extent / 2)`, with 0 for the axis that it runs along.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mode = Literal["obb_rel", "obb_rot", "absolute"]
"""How a joint is described: by a box edge (`obb_rel`), by a point relative to the box center (`obb_rot`), or in world
coordinates (`absolute`)."""

HINGE, SLIDE = "hinge", "slide"
EDGES = ((1, 1), (1, -1), (-1, 1), (-1, -1))
PERMUTATIONS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True, eq=False)
class Box:
    """An oriented box. The columns of `rotation` are its axes; they may be rounded or left-handed."""

    center: Array
    """Shape (3)."""
    rotation: Array
    """Shape (3, 3)."""
    extent: Array
    """Full side lengths (3)."""

    def axis(self, idx: int) -> Array:
        """The unit vector (3) of axis `idx`."""
        column = self.rotation[:, idx]
        return np.asarray(column / np.linalg.norm(column))

    def edge(self, idx: int, edge: Sequence[int]) -> Array:
        """The midpoint (3) of an edge along axis `idx`. `edge` has its signs (1 or -1) on the other two axes."""
        return np.asarray(self.center + self.rotation @ (np.insert(np.array(edge, float), idx, 0.0) * self.extent / 2))

    def corners(self) -> Array:
        """The corners (8, 3); the sign along the box's z changes fastest."""
        signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], float)
        return np.asarray(self.center + (signs * self.extent / 2) @ self.rotation.T)

    def moved_copy(self, turn: Array, offset: Array) -> "Box":
        """The box rotated by `turn` (3, 3), then shifted by `offset` (3)."""
        return Box(turn @ self.center + offset, turn @ self.rotation, self.extent)

    def with_ordered_axes(self) -> "Box":
        """The same box with its axes permuted to align best with the world's x, y and z."""
        best = max(PERMUTATIONS, key=lambda order: sum(abs(self.rotation[i, column]) for i, column in enumerate(order)))
        return Box(self.center, self.rotation[:, best], self.extent[list(best)])

    def as_json(self) -> dict[str, Any]:
        """The box as lists, with the keys of an OBB file."""
        return {"center": self.center.tolist(), "R": self.rotation.tolist(), "extent": self.extent.tolist()}


def box_from(value: Mapping[str, Any]) -> Box:
    """The box of a mapping with the keys of an OBB file; see `Box.as_json`."""
    return Box(*(np.array(value[key], float) for key in ("center", "R", "extent")))


@dataclass(frozen=True, eq=False)
class Joint:
    """A joint in world coordinates."""

    box: int
    type: str
    """`hinge` or `slide`."""
    pos: Array
    """A point (3) on its axis; without meaning for a slide."""
    axis: Array
    """Unit vector (3); the part opens in its positive direction."""

    def moved_copy(self, turn: Array, offset: Array) -> "Joint":
        """The joint rotated by `turn` (3, 3), then shifted by `offset` (3)."""
        return replace(self, pos=turn @ self.pos + offset, axis=turn @ self.axis)


def rotation_about_z(angle: float) -> Array:
    """The rotation matrix (3, 3) about z by an angle in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


# -- labels --------------------------------------------------------------------------------------------------------


def encode(joint: Joint, box: Box, mode: Mode) -> dict[str, Any]:
    """The fields of a joint in its label. In `obb_rot` the box must have ordered axes (`Box.with_ordered_axes`).

    `idx` is the box axis with the smallest angle to the joint's axis, `sign` its direction. `obb_rel` names the corner
    edge nearest to the joint's line. `obb_rot` writes two of the three world coordinates from the box center to a point
    of the joint's line. It takes the point whose third coordinate is 0, so nothing is lost if the box is rotated
    against the world. If the line is almost perpendicular to the axis of that coordinate, it takes the point nearest to
    the box center and drops the third coordinate. `absolute` takes the point nearest to the box center, because the
    error of a rounded axis grows with the distance. A slide has no position: its edge is constant and its point is the
    box center.
    """
    along = [float(box.axis(idx) @ joint.axis) for idx in range(3)]
    idx = int(np.argmax(np.abs(along)))
    common = {"box": joint.box, "type": joint.type}
    place = nearest_point(joint, box.center) if joint.type == HINGE else box.center
    if mode == "absolute":
        # the original rounds to one decimal, which is up to 4 degrees off
        return common | {"pos": rounded_values(place), "axis": rounded_values(joint.axis)}
    sign = 1 if along[idx] > 0 else -1
    edge: list[Any] = [1, 1]
    if mode == "obb_rot":
        offset = place - box.center
        flat = offset - joint.axis * (offset[idx] / joint.axis[idx]) if abs(joint.axis[idx]) > 0.1 else offset
        edge = rounded_values(np.delete(flat, idx)) if joint.type == HINGE else [0.0, 0.0]
    elif joint.type == HINGE:
        apart = [distance(joint, box.edge(idx, signs)) for signs in EDGES]
        edge = list(EDGES[apart.index(min(apart))])
    return common | {"idx": idx, "edge": edge, "sign": sign}


def decode(label: Mapping[str, Any], box: Box, mode: Mode) -> Joint:
    """The joint that a label describes. In `obb_rot` the box must have ordered axes (`Box.with_ordered_axes`)."""
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


def rounded_values(values: Array) -> list[float]:
    """The values rounded to 2 decimals, 0.0 instead of -0.0."""
    return [round(float(value), 2) + 0.0 for value in values]


# -- distances between joints --------------------------------------------------------------------------------------


def angle(first: Array, second: Array, signed: bool) -> float:
    """The angle between two unit vectors in degrees: 0 to 180, or 0 to 90 if not `signed`."""
    cosine = float(first @ second)
    return float(np.degrees(np.arccos(np.clip(cosine if signed else abs(cosine), -1, 1))))


def nearest_point(joint: Joint, point: Array) -> Array:
    """The point (3) of the joint's line that is nearest to `point` (3)."""
    return np.asarray(joint.pos + joint.axis * float(joint.axis @ (point - joint.pos)))


def distance(joint: Joint, point: Array) -> float:
    """The distance from `point` (3) to the joint's line, in metres."""
    return float(np.linalg.norm(nearest_point(joint, point) - point))


def line_distance(true: Joint, other: Joint, near: Array) -> float:
    """The distance between two joints' lines at the part, in metres: from the point on the true line nearest to
    `near`, the center of its box, to the other line.

    For parallel lines this is their distance. The shortest distance between two other lines does not say how close
    they are at the part: nearly parallel lines come close far away from the object, crossing lines anywhere.
    """
    return distance(other, nearest_point(true, near))


def edge_of(joint: Joint, box: Box) -> tuple[int, int, int]:
    """The axis index and the two signs of the box edge that `encode` names for a hinge in `obb_rel`: of the four edges
    along the axis with the smallest angle to the hinge, the nearest one."""
    label = encode(joint, box, "obb_rel")
    return label["idx"], *label["edge"]
