"""The code that models read and write: boxes and the joints between them. It is parsed, never executed.

    bboxes={0:{'center':[0.1,0.2,0.3],'R':[[1.0,0.0,0.0],[0.0,1.0,0.0],[0.0,0.0,1.0]],'extent':[0.4,0.5,0.6]},}

    root_geom = 1
    child_joints = [
    dict(box=0,type='hinge',idx=2,edge=[1, 1],sign=1),
    ]

In mode `absolute` a joint is `dict(box=0,type='hinge',pos=[0.1, 0.2, 0.3],axis=[0.0, 0.0, 1.0]),` instead.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.tasks.articulation.geometry import HINGE, SLIDE, Box, Mode, rounded_values

KEYS: Mapping[Mode, tuple[str, ...]] = {
    "obb_rel": ("box", "type", "idx", "edge", "sign"),
    "obb_rot": ("box", "type", "idx", "edge", "sign"),
    "absolute": ("box", "type", "pos", "axis"),
}
LONGEST = 20_000
"""Characters of a completion that are searched; the code of a hundred joints is shorter."""

_CODE = re.compile(
    r"^[ \t]*root_geom\s*=\s*\d+[ \t]*\n\s*child_joints\s*=\s*\[[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\]", re.M
)


@dataclass(frozen=True)
class Code:
    """The content of a label or an answer."""

    root: int
    joints: tuple[dict[str, Any], ...]
    """One for each joint, with the KEYS of its mode."""


class GrammarError(ValueError):
    """Text that does not follow the grammar."""


def boxes_code(boxes: Mapping[int, Box]) -> str:
    """The boxes as a prompt shows them, rounded to 2 decimals, without spaces."""
    parts = []
    for number, box in boxes.items():
        center, extent = _compact_json(rounded_values(box.center)), _compact_json(rounded_values(box.extent))
        rotation = _compact_json([rounded_values(row) for row in box.rotation])
        parts.append(f"{number}:{{'center':{center},'R':{rotation},'extent':{extent}}},")
    return f"bboxes={{{''.join(parts)}}}"


def _compact_json(value: Any) -> str:
    """A value as JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def joints_code(root: int, joints: Sequence[Mapping[str, Any]]) -> str:
    """The code of a label or an answer: the number of the root's box, then a line for each joint."""
    lines = [f"dict({','.join(f'{key}={value!r}' for key, value in joint.items())})," for joint in joints]
    return "\n".join([f"root_geom = {root}", "child_joints = [", *lines, "]"])


def find_code(text: str, mode: Mode) -> Code | None:
    """The first complete and valid code in the first LONGEST characters of a completion, whatever surrounds it; None if
    there is none."""
    for match in _CODE.finditer(text[:LONGEST]):
        try:
            return parse(match.group().strip(), mode)
        except GrammarError:
            continue
    return None


def parse(code: str, mode: Mode) -> Code:
    """The content of a label or an answer. Raises GrammarError unless it is the two assignments, each joint with the
    exact keys of the mode and values that they can have."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GrammarError(f"not Python: {error}") from error
    if len(statements) != 2:
        raise GrammarError(f"found {len(statements)} statements; expected two, root_geom and child_joints")
    root = _assigned_value(statements[0], "root_geom")
    joints = _assigned_value(statements[1], "child_joints")
    if not isinstance(joints, ast.List):
        raise GrammarError("child_joints is not a list")
    return Code(_integer(root, "root_geom", range(10_000)), tuple(_joint(node, mode) for node in joints.elts))


def _assigned_value(statement: ast.stmt, name: str) -> ast.expr:
    """The right side of an assignment to `name`. Raises GrammarError for another statement."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
            return value
    raise GrammarError(f"no assignment to {name}")


def _joint(node: ast.expr, mode: Mode) -> dict[str, Any]:
    """The fields of one `dict(...)`. Raises GrammarError for another form."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict") or node.args:
        raise GrammarError(f"found {_source(node)} as a joint; expected dict(...) with keyword arguments only")
    keys = [keyword.arg for keyword in node.keywords]
    if sorted(map(str, keys)) != sorted(KEYS[mode]):
        raise GrammarError(f"found a joint with {', '.join(map(str, keys))}; expected {', '.join(KEYS[mode])}")
    given = {str(keyword.arg): keyword.value for keyword in node.keywords}
    return {key: _value(key, given[key], mode) for key in KEYS[mode]}


def _value(key: str, node: ast.expr, mode: Mode) -> Any:
    """The value of one key of a joint. Raises GrammarError for a value that the key cannot have."""
    if key == "box":
        return _integer(node, key, range(10_000))
    if key == "idx":
        return _integer(node, key, range(3))
    if key == "sign":
        return _integer(node, key, (1, -1))
    if key == "type":
        if isinstance(node, ast.Constant) and node.value in (HINGE, SLIDE):
            return node.value
        raise GrammarError(f"type={_source(node)} is not allowed; expected {HINGE} or {SLIDE}")
    count = 2 if key == "edge" else 3
    if not isinstance(node, ast.List) or len(node.elts) != count:
        raise GrammarError(f"{key}={_source(node)} is not a list of {count}")
    if mode == "obb_rel":
        return [_integer(each, key, (1, -1)) for each in node.elts]
    values = [float(_number(each, key)) for each in node.elts]
    if key == "axis" and max(map(abs, values)) < 1e-3:
        raise GrammarError("axis is zero")
    return values


def _integer(node: ast.expr, key: str, allowed: Sequence[int]) -> int:
    """An integer among the allowed ones. Raises GrammarError for another value."""
    value = _number(node, key)
    if value != int(value) or int(value) not in allowed:
        raise GrammarError(f"{key}={value} is not allowed")
    return int(value)


def _number(node: ast.expr, key: str) -> float:
    """A number with or without a sign. Raises GrammarError for anything else, and for magnitudes of a million and
    above."""
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign, node = -1 if isinstance(node.op, ast.USub) else 1, node.operand
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value < 1e6:
        raise GrammarError(f"{key}={_source(node)} is not a number below a million")
    return sign * value


def _source(node: ast.expr) -> str:
    """An expression as Python code, shortened to 60 characters. A completion may nest it too deep to be written."""
    try:
        return ast.unparse(node)[:60]
    except RecursionError:
        return f"{type(node).__name__} (nested too deep)"
