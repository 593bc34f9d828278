"""An object's boxes and joints as SVG, seen from the front (-x), slightly from the right and from above."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stages.tasks.articulation.geometry import HINGE, Array, Box, Joint, nearest_point
from stages.tasks.articulation.scoring import Comparison

SIDE, GAP, HEAD = 220, 20, 22
"""Side of a panel, gap between two panels, and height of the headings above them, in units of the drawing."""

RIGHT, WRONG, TRUE = "var(--gain, #17733b)", "var(--loss, #b3261e)", "var(--model-1, #1f6feb)"

_LOOK = np.array([0.75, 0.45, -0.5]) / np.linalg.norm([0.75, 0.45, -0.5])
_ACROSS = np.cross(_LOOK, [0, 0, 1]) / np.linalg.norm(np.cross(_LOOK, [0, 0, 1]))
_VIEW = np.array([_ACROSS, -np.cross(_ACROSS, _LOOK)])
"""(2, 3): maps world coordinates to right and down in the drawing."""

Place = Callable[[Array], tuple[float, float]]
"""Maps a point in world coordinates to x and y in a panel."""

_BOX_EDGES = [(a, a | bit) for a in range(8) for bit in (1, 2, 4) if not a & bit]


def draw(
    boxes: Mapping[int, Box],
    root: int,
    true: Sequence[Joint],
    predicted: Sequence[Joint | None] | None = None,
    found: Comparison | None = None,
    predicted_root: int | None = None,
) -> str:
    """An SVG with two panels: the true joints, and an answer's joints, green if right and red if wrong. Without an
    answer, the second panel is only a heading.

    A hinge is an arrow along its axis, as long as its box; a slide is a dashed arrow from the box's center. The root's
    box has thick lines.
    """
    points = np.concatenate([box.corners() for box in boxes.values()]) @ _VIEW.T
    low, size = points.min(axis=0), float(np.ptp(points, axis=0).max()) or 1.0
    room = 0.14 * SIDE  # margin for joints that extend beyond the boxes

    def place(point: Array) -> tuple[float, float]:
        """A point (3) in world coordinates as x and y in a panel, scaled so that all boxes fit."""
        x, y = (point @ _VIEW.T - low) / size * (SIDE - 2 * room) + room
        return round(float(x), 1), round(float(y), 1)

    panels = [_panel("true", boxes, root, [(joint, TRUE) for joint in true], place)]
    if predicted is None or found is None or predicted_root is None:
        panels.append(_heading("predicted: no answer"))
    else:
        right = {at for pair, at in zip(found.pairs, found.partner, strict=True) if pair is not None and pair.is_right}
        coloured = [(joint, RIGHT if at in right else WRONG) for at, joint in enumerate(predicted) if joint is not None]
        counts = f"{len(right)} of {len(true)} right, {found.missing_count} missing, {found.extra_count} extra"
        panels.append(_panel(f"predicted: {counts}", boxes, predicted_root, coloured, place))
    width = 2 * SIDE + GAP
    shifted = "".join(
        f'<g transform="translate({number * (SIDE + GAP)} 0)">{panel}</g>' for number, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {SIDE + HEAD}" role="img"'
        f' font-family="sans-serif" fill="none" stroke-linecap="round">{shifted}</svg>'
    )


def _panel(heading: str, boxes: Mapping[int, Box], root: int, joints: Sequence[tuple[Joint, str]], place: Place) -> str:
    """SVG elements of one panel: heading, boxes with their numbers, and joints, each with its colour."""
    parts = [_heading(heading), f'<g transform="translate(0 {HEAD})">']
    for number, box in boxes.items():
        corners = [place(corner) for corner in box.corners()]
        lines = "".join(f"M{_xy(corners[a])}L{_xy(corners[b])}" for a, b in _BOX_EDGES)
        width = 1.6 if number == root else 0.8
        parts.append(f'<path d="{lines}" stroke="currentColor" stroke-opacity="0.55" stroke-width="{width}"/>')
        x, y = place(box.center)
        parts.append(f'<text x="{x}" y="{y}" font-size="9" fill="currentColor" fill-opacity="0.7">{number}</text>')
    for joint, colour in joints:
        box = boxes[joint.box]
        half = float(np.abs(box.rotation.T @ joint.axis) @ box.extent) / 2
        if joint.type == HINGE:
            middle = nearest_point(joint, box.center)
            start, end = middle - joint.axis * half, middle + joint.axis * (half + 0.08)
        else:
            start, end = box.center, box.center + joint.axis * (half + 0.15)
        parts.append(_arrow(place(start), place(end), colour, "" if joint.type == HINGE else ' stroke-dasharray="4 3"'))
    return "".join([*parts, "</g>"])


def _arrow(start: tuple[float, float], end: tuple[float, float], colour: str, dash: str) -> str:
    """SVG elements of an arrow. `dash` is an attribute of its line, or empty."""
    along = np.array(end) - np.array(start)
    length = float(np.hypot(*along)) or 1.0
    back, side = -along / length * 6, np.array([-along[1], along[0]]) / length * 3
    tips = [tuple(np.round(np.array(end) + back + turn * side, 1).tolist()) for turn in (1, -1)]
    head = f"M{_xy(tips[0])}L{_xy(end)}L{_xy(tips[1])}"
    return f'<g stroke="{colour}" stroke-width="2.2"><path d="M{_xy(start)}L{_xy(end)}"{dash}/><path d="{head}"/></g>'


def _xy(point: tuple[float, ...]) -> str:
    """A point as SVG paths write it."""
    return f"{point[0]:g} {point[1]:g}"


def _heading(text: str) -> str:
    """The SVG element of a panel's heading."""
    return f'<text x="2" y="14" font-size="11" fill="currentColor">{text}</text>'
