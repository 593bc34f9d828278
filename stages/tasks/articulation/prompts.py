"""The prompt: the boxes, the meaning of a joint's keys, and the form of the answer."""

from collections.abc import Mapping

from stages.contract.records import Message
from stages.tasks.articulation.geometry import Box, Mode
from stages.tasks.articulation.grammar import boxes_code

_ROLE = "You are an expert on articulated objects. From the oriented boxes of an object's parts you write its joints."
_COMMON = (
    "root_geom: the box that does not move.\nchild_joints: one for each box that moves.\n"
    "box: its number. type: 'hinge' if it turns, 'slide' if it is pulled."
)
_KEYS: Mapping[Mode, str] = {
    "obb_rel": "idx: the column of its R that the joint runs along. edge: which of the box's four edges along it a"
    " hinge is at, as signs of the other two columns, such as [1, -1]; of a slide [1, 1]. sign: 1 if it opens to the"
    " column's side, else -1.",
    "obb_rot": "idx: the column of its R that the joint runs along. edge: where a hinge is from the center, in metres,"
    " without coordinate idx; of a slide [0.0, 0.0]. sign: 1 if it opens to the column's side, else -1.",
    "absolute": "pos: a point that a hinge runs through; of a slide the center. axis: its direction.",
}
_FORM: Mapping[Mode, str] = {
    "obb_rel": "dict(box=...,type=...,idx=...,edge=[..., ...],sign=...),",
    "obb_rot": "dict(box=...,type=...,idx=...,edge=[..., ...],sign=...),",
    "absolute": "dict(box=...,type=...,pos=[..., ..., ...],axis=[..., ..., ...]),",
}


def joints_prompt(boxes: Mapping[int, Box], mode: Mode) -> list[Message]:
    """The prompt that asks for the joints between boxes, in the grammar of the mode."""
    asked = (
        f"OBB Information:\n### Input:\n{boxes_code(boxes)}\n{_COMMON}\n{_KEYS[mode]}\n"
        f"Write ONLY this:\nroot_geom = ...\nchild_joints = [\n{_FORM[mode]}\n]\n### Response:"
    )
    return [{"role": "system", "content": _ROLE}, {"role": "user", "content": asked}]
