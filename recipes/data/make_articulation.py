"""Write the data of the recipe articulation: cabinets with known joints.

A cabinet is a body with parts on its front: doors, drawers and flaps, in one or two columns of one to three cells. The
box shows what a part is: a drawer is deep, a door is higher than wide, a flap wider than high. Doors turn at the outer
side of the cabinet (in a single column, at the left side), flaps of the lower half at their lower edge, others at the
upper edge. Some drawers have a flap mounted on them.

The world is z up, and the front faces -x. `obb_link_<k>.json` has boxes in world coordinates. `mobility.urdf` is y up,
as in PartNet-Mobility; half of the files have its fixed joint from `base`, which turns the object upright, the others
lack it. Link numbers are random, the body's too. In `loop_0` all parts are closed; in the other loops parts are open,
and their boxes turned or moved. With `--turned`, cabinets face any direction, and a box's axes have any order and sign.

The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "articulation"
KIND = "Cabinet"

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]
"""Rows."""

ONE: Matrix = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
UPRIGHT: Matrix = ((0, 0, -1), (-1, 0, 0), (0, 1, 0))
"""World = UPRIGHT @ URDF."""
BASE_RPY = "1.570796326794897 0 -1.570796326794897"
DEPTH, WIDTH, HEIGHT = (0.3, 0.6), (0.4, 0.7), (0.4, 1.0)
"""Ranges of a cabinet's size, in metres."""


@dataclass
class Part:
    """A part at rest, in the world."""

    kind: str
    """`body`, `door`, `drawer` or `flap`."""
    center: Vector
    extent: Vector
    pos: Vector = (0, 0, 0)
    """A point of its joint's axis."""
    axis: Vector = (0, 0, 1)
    upper: float = 0
    """How far it opens, in radians or metres."""
    parent: int = 0
    """Index of the part that it is mounted on."""

    @property
    def type(self) -> str:
        return "prismatic" if self.kind == "drawer" else "revolute"


# -- geometry --------------------------------------------------------------------------------------------------------


def times(matrix: Matrix, vector: Vector) -> Vector:
    first, second, third = (sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)
    return first, second, third


def product(first: Matrix, second: Matrix) -> Matrix:
    return transposed(tuple(times(first, column) for column in transposed(second)))  # type: ignore[arg-type]


def transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))  # type: ignore[return-value]


def plus(first: Vector, second: Vector, factor: float = 1) -> Vector:
    x, y, z = (a + factor * b for a, b in zip(first, second, strict=True))
    return x, y, z


def about(axis: Vector, angle: float) -> Matrix:
    """The rotation about a unit vector by an angle in radians (Rodrigues)."""
    x, y, z = axis
    c, s, t = math.cos(angle), math.sin(angle), 1 - math.cos(angle)
    return (
        (t * x * x + c, t * x * y - s * z, t * x * z + s * y),
        (t * x * y + s * z, t * y * y + c, t * y * z - s * x),
        (t * x * z - s * y, t * y * z + s * x, t * z * z + c),
    )


# -- cabinets --------------------------------------------------------------------------------------------------------


def make_cabinet(rng: random.Random, most_boxes: int) -> list[Part]:
    """The body, then its parts."""
    depth, width, height = (rng.uniform(*each) for each in (DEPTH, WIDTH, HEIGHT))
    parts = [Part("body", (0, 0, height / 2), (depth, width, height))]
    columns = rng.choice((1, 2)) if most_boxes > 2 else 1
    for column in range(columns):
        cells = min(rng.choice((1, 1, 2, 3)), max((most_boxes - 1) // columns, 1))
        cuts = sorted(rng.uniform(0.35, 0.65) if cells == 2 else (row + 1) / cells for row in range(cells - 1))
        levels = [0.0, *cuts, 1.0]
        left = width / 2 - column * width / columns
        for low, high in pairwise(levels):
            cell = (left - width / columns, left, low * height, high * height)
            parts.append(_part(rng, parts[0], cell, outer_left=column == 0))
    drawers = [place for place, part in enumerate(parts) if part.kind == "drawer"]
    if drawers and len(parts) < most_boxes and rng.random() < 0.3:
        parts.append(_front(parts[drawers[0]], drawers[0]))
    return parts


def _part(rng: random.Random, body: Part, cell: Sequence[float], outer_left: bool) -> Part:
    """The part in a cell of the front; y points left as seen from the front."""
    right, left, low, high = (cell[0] + 0.01, cell[1] - 0.01, cell[2] + 0.01, cell[3] - 0.01)
    front, across, up = -body.extent[0] / 2, left - right, high - low
    middle = ((left + right) / 2, (low + high) / 2)
    if rng.random() < 0.4:
        deep = 0.8 * body.extent[0]
        center = (front + deep / 2 - 0.02, *middle)
        return Part("drawer", center, (deep, across, up), center, (-1, 0, 0), round(0.6 * deep, 3))
    thick = rng.uniform(0.02, 0.04)
    center, extent = (front - thick / 2, *middle), (thick, across, up)
    if up > across:
        side, turn = (left, -1) if outer_left else (right, 1)
        return Part("door", center, extent, (front, side, middle[1]), (0, 0, turn), 1.57)
    below = middle[1] < body.extent[2] / 2
    return Part("flap", center, extent, (front, middle[0], low if below else high), (0, -1 if below else 1, 0), 1.2)


def _front(drawer: Part, place: int) -> Part:
    """A flap on the front of a drawer: it turns at the drawer's lower edge, and moves with the drawer."""
    x, y, z = drawer.center
    deep, across, up = drawer.extent
    front, thick = x - deep / 2, 0.03
    center = (front - thick / 2, y, z)
    return Part("flap", center, (thick, across * 0.9, up), (front, y, z - up / 2), (0, -1, 0), 1.2, place)


def turned(parts: list[Part], turn: Matrix) -> list[Part]:
    """The parts with their joints turned, for a cabinet that faces another direction; boxes are turned when written."""
    return [
        Part(
            part.kind, part.center, part.extent, times(turn, part.pos), times(turn, part.axis), part.upper, part.parent
        )
        for part in parts
    ]


# -- files -----------------------------------------------------------------------------------------------------------


def boxes_of(
    rng: random.Random, parts: list[Part], turn: Matrix, is_open: bool, any_axes: bool
) -> list[dict[str, Any]]:
    """The boxes of a loop. Parts that carry others, or are carried, stay closed: a URDF describes the rest position."""
    still = {part.parent for part in parts[1:]} | {place for place, part in enumerate(parts) if part.parent}
    found = []
    for place, part in enumerate(parts):
        center, rotation = part.center, ONE
        by = part.upper * rng.uniform(0.15, 0.6) if is_open and place not in still else 0.0
        if by and part.type == "prismatic":
            center = plus(center, part.axis, by)
        elif by:
            rotation = about(part.axis, by)
            center = plus(part.pos, times(rotation, plus(center, part.pos, -1)))
        columns, extent = transposed(product(turn, rotation)), part.extent
        if any_axes:
            order = rng.sample(range(3), 3)
            signs = [rng.choice((-1, 1)) for _ in range(3)]
            columns = tuple(tuple(signs[i] * value for value in columns[i]) for i in order)  # type: ignore[assignment]
            extent = tuple(extent[i] for i in order)  # type: ignore[assignment]
        box = {"center": times(turn, center), "R": transposed(columns), "extent": extent}
        found.append({key: _rounded(value) for key, value in box.items()})
    return found


def urdf_of(rng: random.Random, parts: list[Part], links: list[int], with_base: bool) -> str:
    """The object as URDF, y up. Each link has its own frame, turned about the vertical by its parent's joint."""
    lines = ['<?xml version="1.0" ?>', '<robot name="cabinet">']
    if with_base:
        lines.append('  <link name="base"/>')
    lines += [f'  <link name="link_{link}"/>' for link in sorted(links)]
    frames: dict[int, tuple[Matrix, Vector]] = {0: (ONE, (0, 0, 0))}
    for place in range(1, len(parts)):
        part = parts[place]
        turn, origin = frames[part.parent]
        # in the parent's frame
        pos = times(transposed(turn), plus(times(transposed(UPRIGHT), part.pos), origin, -1))
        yaw = rng.choice((0.0, 0.0, 0.5, -1.2))
        own = product(turn, about((0, 1, 0), yaw))
        frames[place] = own, plus(origin, times(turn, pos))
        axis = times(transposed(own), times(transposed(UPRIGHT), part.axis))
        lines += [
            f'  <joint name="joint_{links[place]}" type="{part.type}">',
            f'    <origin xyz="{_words(pos)}" rpy="0 {yaw:g} 0"/>',
            f'    <axis xyz="{_words(axis)}"/>',
            f'    <parent link="link_{links[part.parent]}"/>',
            f'    <child link="link_{links[place]}"/>',
            f'    <limit lower="0" upper="{part.upper}"/>',
            "  </joint>",
        ]
    if with_base:
        lines += [
            f'  <joint name="joint_{links[0]}" type="fixed">',
            f'    <origin rpy="{BASE_RPY}" xyz="0 0 0"/>',
            f'    <child link="link_{links[0]}"/>',
            '    <parent link="base"/>',
            "  </joint>",
        ]
    return "\n".join([*lines, "</robot>", ""])


def _words(vector: Vector) -> str:
    return " ".join(f"{round(value, 6) + 0.0:g}" for value in vector)


def _rounded(value: Any) -> Any:
    return [_rounded(each) for each in value] if isinstance(value, tuple) else round(value, 5) + 0.0


def write_object(
    folder: Path, split: str, name: str, rng: random.Random, loops: int, most_boxes: int, any_direction: bool
) -> list[Part]:
    """One cabinet's files. Returns its parts with their joints in the world, by link number."""
    parts = make_cabinet(rng, most_boxes)
    links = rng.sample(range(len(parts)), len(parts))
    turn = about((0, 0, 1), rng.uniform(-math.pi, math.pi)) if any_direction else ONE
    placed = turned(parts, turn)
    urdf = folder / "mobility_dataset_v2" / split / KIND / name / "mobility.urdf"
    urdf.parent.mkdir(parents=True, exist_ok=True)
    urdf.write_text(urdf_of(rng, placed, links, with_base=rng.random() < 0.5), encoding="utf-8")
    for loop in range(loops):
        inside = folder / "shape_output" / split / KIND / name / f"loop_{loop}"
        inside.mkdir(parents=True, exist_ok=True)
        for link, box in zip(links, boxes_of(rng, parts, turn, loop > 0, any_direction), strict=True):
            (inside / f"obb_link_{link}.json").write_text(json.dumps(box) + "\n", encoding="utf-8")
    return [placed[links.index(link)] for link in range(len(links))]


def make(
    folder: Path, seed: int, train: int, test: int, loops: int = 2, most_boxes: int = 5, any_direction: bool = False
) -> dict[str, list[Part]]:
    """Write a data folder. Returns each object's parts, by its name, in the order of their link numbers."""
    found = {}
    for split, count, first in (("train", train, 10_000), ("test", test, 90_000)):
        for number in range(first, first + count):
            rng = random.Random(f"{seed}-{number}")
            found[str(number)] = write_object(folder, split, str(number), rng, loops, most_boxes, any_direction)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--train", type=int, default=16, help="objects to train on")
    parser.add_argument("--test", type=int, default=4, help="objects held out for test")
    parser.add_argument("--loops", type=int, default=2, help="loops of an object; all but the first are open")
    parser.add_argument("--most-boxes", type=int, default=3, help="boxes of an object, with its body; 2 or more")
    parser.add_argument("--turned", action="store_true", help="turn cabinets in any direction, with axes in any order")
    chosen = parser.parse_args()
    make(chosen.output, chosen.seed, chosen.train, chosen.test, chosen.loops, max(chosen.most_boxes, 2), chosen.turned)


if __name__ == "__main__":
    main()
