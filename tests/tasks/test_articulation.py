"""articulation: frames, labels in three modes, the grammar, the data folder and the samples."""

import json
import math
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.made_data import load_maker
from stages.contract.errors import DataError, UsageError
from stages.contract.recipe import Recipe, load_recipe
from stages.contract.records import failed_prediction
from stages.preprocess.split import split_questions
from stages.tasks import articulation, settle_recipe
from stages.tasks.articulation import grammar
from stages.tasks.articulation.geometry import (
    EDGES,
    HINGE,
    SLIDE,
    Box,
    Joint,
    Mode,
    angle,
    decode,
    encode,
    line_distance,
    rotation_about_z,
)
from stages.tasks.articulation.objects import ObjectQuestion, read_objects
from stages.tasks.articulation.urdf import UPRIGHT, read_urdf
from tests.conftest import REPOSITORY

RECIPE = REPOSITORY / "recipes" / "articulation.yaml"
MODES: tuple[Mode, ...] = ("obb_rel", "obb_rot", "absolute")
TYPES = {"revolute": HINGE, "prismatic": SLIDE}


def recipe_with(*overrides: str) -> Recipe:
    return settle_recipe(load_recipe(RECIPE, "tiny", overrides), "articulation", REPOSITORY / "recipes" / "data")


def no_skip(what: str, reason: str, detail: str = "") -> None:
    raise AssertionError(f"{what}: {reason} {detail}")


class Skipped(list[tuple[str, str]]):
    def __call__(self, what: str, reason: str, detail: str = "") -> None:
        self.append((what, reason))


# -- cabinets whose joints are known ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["in the world's axes", "in any direction"])
def cabinets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """220 generated cabinets of two loops each, as read from disk, and their true parts."""
    folder = tmp_path_factory.mktemp("cabinets")
    made = load_maker("articulation").make(
        folder, seed=7, train=200, test=20, loops=2, most_boxes=6, any_direction=request.param
    )
    return read_objects(folder, no_skip), made


def test_the_cabinets_have_all_that_labels_describe(cabinets: Any) -> None:
    questions, made = cabinets
    assert len(made) == 220 and len(questions) == 440
    parts = [part for parts in made.values() for part in parts]
    kinds = Counter(part.kind for part in parts)
    assert min(kinds[kind] for kind in ("door", "drawer", "flap")) > 100
    assert sum(nested.parent != one.view.root for one in questions for nested in one.view.nested.values()) > 20
    assert Counter(one.view.root == max(one.view.boxes) for one in questions)[False] > 200, "any box may be the root"


@pytest.mark.parametrize("mode", MODES)
def test_labels_decode_to_the_true_joints(cabinets: Any, mode: Mode) -> None:
    """The true axis within a degree, with its sign, and the true line within a centimetre."""
    questions, made = cabinets
    hinges = 0
    for question in questions:
        parts = made[question.id.split("_")[1]]
        code = grammar.parse(articulation.label(question.view, mode), mode)
        assert parts[code.root].kind == "body"
        assert [joint["box"] for joint in code.joints] == [n for n in range(len(parts)) if n != code.root]
        boxes = articulation.prompt_boxes(question.view.boxes, mode)
        for one in code.joints:
            part, box = parts[one["box"]], boxes[one["box"]]
            true = Joint(one["box"], TYPES[part.type], np.array(part.pos), np.array(part.axis))
            joint = decode(one, box, mode)
            assert joint.type == true.type
            assert angle(joint.axis, true.axis, signed=True) < 1
            if true.type == HINGE:
                hinges += 1
                assert line_distance(true, joint, box.center) < 0.01
                along_true = angle(joint.axis, true.axis, signed=False) < 0.01
                assert not along_true or np.linalg.norm(np.cross(true.axis, joint.pos - true.pos)) < 0.01
    assert hinges > 500


def test_ranges_and_parents_are_kept(cabinets: Any) -> None:
    questions, made = cabinets
    for question in questions:
        parts = made[question.id.split("_")[1]]
        for number, nested in question.view.nested.items():
            assert nested.range == (0, parts[number].upper)
            parent = parts[nested.parent]
            expected = parent.kind == "drawer" and parts[number].kind == "flap"
            assert parent.kind == "body" or expected


@pytest.mark.parametrize("mode", MODES)
def test_the_label_of_a_rotated_copy_is_encoded_again_and_as_accurate(cabinets: Any, mode: Mode) -> None:
    questions, _ = cabinets
    recipe = recipe_with(f"preprocess.samples={{mode: {mode}, copies: 3}}")
    same = 0
    for question in questions[:60]:
        first, *copies = articulation.build_samples(recipe, question, None, "train")
        assert [copy["id"] for copy in copies] == [f"{question.id}#{number}" for number in (1, 2, 3)]
        for copy in copies:
            assert copy["messages"] != first["messages"]
            assert articulation.facts(copy) == {"labels_true_to_the_urdf": 1.0}
            same += copy["references"] == first["references"]
            turned = (
                np.array(copy["meta"]["boxes"]["0"]["center"])[2] - np.array(first["meta"]["boxes"]["0"]["center"])[2]
            )
            assert abs(turned) <= 0.3
    if mode == "obb_rel":
        assert same == 180, "the same edge of the same box, however it is rotated"
    else:
        assert same < 30, "only drawers that hardly moved"


def test_copies_are_made_for_training_only_and_are_reproducible(cabinets: Any) -> None:
    question = cabinets[0][0]
    recipe = recipe_with("preprocess.samples.copies=2")
    built = {
        split: articulation.build_samples(recipe, question, None, split) for split in ("train", "validation", "test")
    }
    assert {split: len(samples) for split, samples in built.items()} == {"train": 3, "validation": 1, "test": 1}
    again = articulation.build_samples(recipe, question, None, "train")
    assert again == articulation.build_samples(recipe, question, None, "train")
    other = recipe.model_copy(update={"seed": 1})
    assert again[1]["messages"] != articulation.build_samples(other, question, None, "train")[1]["messages"]


# -- frames ----------------------------------------------------------------------------------------------------------


def urdf(folder: Path, joints: str, links: str = "") -> Path:
    path = folder / "mobility.urdf"
    path.write_text(f'<robot name="o">{links}{joints}</robot>', encoding="utf-8")
    return path


def joint(
    child: str, parent: str, kind: str = "revolute", xyz: str = "0 0 0", rpy: str = "0 0 0", axis: str = "0 1 0"
) -> str:
    return (
        f'<joint name="j" type="{kind}"><origin xyz="{xyz}" rpy="{rpy}"/><axis xyz="{axis}"/>'
        f'<parent link="{parent}"/><child link="{child}"/></joint>'
    )


BASE = joint("link_1", "base", "fixed", rpy="1.570796326794897 0 -1.570796326794897")


@pytest.mark.parametrize("base", ["", BASE], ids=["without base", "with PartNet's base"])
def test_a_joint_is_transformed_into_the_world_once(tmp_path: Path, base: str) -> None:
    found = read_urdf(urdf(tmp_path, base + joint("link_0", "link_1", xyz="0.64 0.1 0.42"))).joints["link_0"]
    np.testing.assert_allclose(found.pos, [-0.42, -0.64, 0.1], atol=1e-6)
    np.testing.assert_allclose(found.axis, [0, 0, 1], atol=1e-6)


def test_transforms_of_the_parents_are_composed(tmp_path: Path) -> None:
    quarter = f"0 {math.pi / 2} 0"  # about y: z goes to x
    path = urdf(
        tmp_path,
        joint("link_0", "link_2", xyz="1 0 0", rpy=quarter, axis="0 1 0")
        + joint("link_3", "link_0", "fixed", xyz="0 0 1")
        + joint("link_1", "link_3", xyz="0 0.5 1", axis="1 0 0"),
    )
    found = read_urdf(path)
    inner = found.joints["link_1"]
    # in the file's frame: (1, 0, 0), then z runs along x: 1 + 1 + 1, and y is unchanged
    np.testing.assert_allclose(inner.pos, UPRIGHT @ [3, 0.5, 0], atol=1e-9)
    np.testing.assert_allclose(inner.axis, UPRIGHT @ [0, 0, -1], atol=1e-9)
    assert [found.body_link(f"link_{n}") for n in range(4)] == ["link_0", "link_1", "link_2", "link_0"]


def test_roll_pitch_and_yaw_are_applied_in_urdfs_order(tmp_path: Path) -> None:
    path = urdf(tmp_path, joint("link_0", "link_1", rpy="0.3 -0.7 1.1", axis="1 2 3"))
    roll, pitch, yaw = 0.3, -0.7, 1.1
    about_x = np.array([[1, 0, 0], [0, np.cos(roll), -np.sin(roll)], [0, np.sin(roll), np.cos(roll)]])
    about_y = np.array([[np.cos(pitch), 0, np.sin(pitch)], [0, 1, 0], [-np.sin(pitch), 0, np.cos(pitch)]])
    expected = UPRIGHT @ rotation_about_z(yaw) @ about_y @ about_x @ np.array([1, 2, 3]) / math.sqrt(14)
    np.testing.assert_allclose(read_urdf(path).joints["link_0"].axis, expected, atol=1e-9)


# -- labels ----------------------------------------------------------------------------------------------------------

ROUND = st.floats(-1, 1, allow_nan=False).map(lambda x: round(x, 3))


@given(
    center=st.tuples(ROUND, ROUND, ROUND),
    yaw=st.floats(-math.pi, math.pi),
    extent=st.tuples(*[st.floats(0.05, 1.0)] * 3),
    idx=st.integers(0, 2),
    edge=st.sampled_from(EDGES),
    sign=st.sampled_from((1, -1)),
    order=st.permutations(range(3)),
)
@settings(max_examples=200)
def test_every_edge_of_every_box_decodes_to_itself(
    center: Any, yaw: float, extent: Any, idx: int, edge: Any, sign: int, order: list[int]
) -> None:
    box = Box(np.array(center), rotation_about_z(yaw)[:, order], np.array(extent))
    label = {"box": 0, "type": HINGE, "idx": idx, "edge": list(edge), "sign": sign}
    assert encode(decode(label, box, "obb_rel"), box, "obb_rel") == label
    true = decode(label, box, "obb_rel")
    for mode in ("obb_rot", "absolute"):
        shown = box.with_ordered_axes() if mode == "obb_rot" else box
        found = decode(encode(true, shown, mode), shown, mode)  # type: ignore[arg-type]
        assert angle(true.axis, found.axis, signed=True) < 1
        assert line_distance(true, found, box.center) < 0.01


def test_a_slide_has_no_position() -> None:
    box = Box(np.array([0.1, 0.2, 0.3]), np.eye(3), np.array([0.4, 0.4, 0.2]))
    drawer = Joint(0, SLIDE, np.array([9.0, 9, 9]), np.array([-1.0, 0, 0]))
    assert encode(drawer, box, "obb_rel") == {"box": 0, "type": SLIDE, "idx": 0, "edge": [1, 1], "sign": -1}
    assert encode(drawer, box, "obb_rot")["edge"] == [0.0, 0.0]
    assert encode(drawer, box, "absolute")["pos"] == [0.1, 0.2, 0.3]


def test_boxes_as_the_original_rounds_them_are_accepted() -> None:
    """Axes to one decimal are neither orthogonal nor of length 1, and may be left-handed."""
    box = Box(np.zeros(3), np.array([[0.6, -0.8, 0], [0.8, 0.7, 0], [0, 0, -1]]), np.array([0.4, 0.02, 1.0]))
    door = Joint(0, HINGE, np.array([0.12, 0.16, 0.3]), np.array([0.0, 0, 1]))
    label = encode(door, box, "obb_rel")
    assert (label["idx"], label["sign"], label["edge"][0]) == (2, -1, 1)
    assert np.linalg.norm(decode(label, box, "obb_rel").axis) == pytest.approx(1)


# -- the grammar -----------------------------------------------------------------------------------------------------

LABEL = "root_geom = 1\nchild_joints = [\ndict(box=0,type='hinge',idx=2,edge=[1, -1],sign=1),\n]"
ABSOLUTE = "root_geom = 1\nchild_joints = [\ndict(box=0,type='slide',pos=[0.1, -0.2, 0.0],axis=[-1.0, 0.0, 0.0]),\n]"
JOINT = {"box": 0, "type": "hinge", "idx": 2, "edge": [1, -1], "sign": 1}


def test_a_label_is_the_originals_text_and_reads_back() -> None:
    assert grammar.joints_code(1, [JOINT]) == LABEL
    assert grammar.parse(LABEL, "obb_rel") == grammar.Code(1, (JOINT,))
    boxes = {3: Box(np.array([0.123, -0.001, 2]), np.eye(3), np.array([1, 0.5, 0.25]))}
    assert grammar.boxes_code(boxes) == (
        "bboxes={3:{'center':[0.12,0.0,2.0],'R':[[1.0,0.0,0.0],[0.0,1.0,0.0],[0.0,0.0,1.0]],'extent':[1.0,0.5,0.25]},}"
    )
    assert grammar.parse(ABSOLUTE, "absolute").joints[0]["axis"] == [-1.0, 0.0, 0.0]
    assert grammar.parse("root_geom = 0\nchild_joints = [\n]", "obb_rel") == grammar.Code(0, ())


@pytest.mark.parametrize(
    "text",
    [
        LABEL,
        f"Here it is:\n```python\n{LABEL}\n```\nThe door turns.",
        f"{LABEL}\n{LABEL.replace('= 1', '= 0')}",
        LABEL.replace("\ndict", " dict").replace("),\n]", ")]").replace("'", '"'),
        LABEL[: LABEL.index("dict")] + "dict(sign=+1, edge=[1.0,-1], type='hinge', idx=2, box=0)]",
        f"root_geom = 2\nchild_joints = [\ndict(box=[0]),\n]\n{LABEL}",
    ],
)  # fmt: skip
def test_code_is_found_whatever_surrounds_it(text: str) -> None:
    found = grammar.find_code(text, "obb_rel")
    assert found == grammar.Code(1, (JOINT,))


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "root_geom = 1",
        LABEL[:-2],  # cut off
        LABEL.replace("root_geom = 1", "root_geom = -1"),
        LABEL.replace("root_geom = 1", "root_geom = x"),
        LABEL.replace("box=0", "box=0.5"),
        LABEL.replace("box=0", "box=True"),
        LABEL.replace("idx=2", "idx=3"),
        LABEL.replace("sign=1", "sign=0"),
        LABEL.replace("sign=1", "sign=1,sign=1"),
        LABEL.replace(",sign=1", ""),
        LABEL.replace("sign=1", "sign=1,range=[0, 1]"),
        LABEL.replace("'hinge'", "'screw'"),
        LABEL.replace("'hinge'", "hinge"),
        LABEL.replace("edge=[1, -1]", "edge=[0.64, 0.42]"),
        LABEL.replace("edge=[1, -1]", "edge=[1, -1, 1]"),
        LABEL.replace("edge=[1, -1]", "edge=(1, -1)"),
        LABEL.replace("dict(", "print("),
        LABEL.replace("dict(", "dict(1,"),
        LABEL.replace("dict(box=0", "dict(**{'box': 0}"),
        LABEL.replace("idx=2", "idx=__import__('os').system('touch /tmp/run')"),
        LABEL.replace("idx=2", "idx=1+1"),
        LABEL.replace("idx=2", f"idx={'9' * 5000}"),
        LABEL.replace("idx=2", "idx=" + "(" * 3000 + "2" + ")" * 3000),
        LABEL.replace("idx=2", "idx=" + "-" * 10_000 + "2"),
        LABEL.replace("idx=2", "idx=" + "1+" * 2000 + "1"),
        LABEL.replace("'hinge'", "1+" * 2000 + "1"),
        LABEL.replace("edge=[1, -1]", "edge=" + "1+" * 2000 + "1"),
        "root_geom = 1\nchild_joints = [\n" + "1+" * 2000 + "1\n]",
        LABEL.replace("child_joints = [", "child_joints = [child_joints, "),
    ],
)
def test_anything_else_is_no_answer_and_is_never_executed(wrong: str) -> None:
    assert grammar.find_code(wrong, "obb_rel") is None
    with pytest.raises(grammar.GrammarError):
        grammar.parse(wrong, "obb_rel")


def test_numbers_must_be_numbers() -> None:
    for value in ("1e999", "nan", "'0.1'", "0.1j", "1e7"):
        assert grammar.find_code(ABSOLUTE.replace("0.1", value), "absolute") is None
    for zero in ("0", "1e-300"):
        assert grammar.find_code(ABSOLUTE.replace("[-1.0, 0.0, 0.0]", f"[{zero}, 0, 0]"), "absolute") is None
    assert grammar.find_code(ABSOLUTE, "obb_rel") is None and grammar.find_code(LABEL, "absolute") is None


@given(st.text(alphabet="root_geom=childjints[]dict(box),'hinge1-.\n ", max_size=300))
@settings(max_examples=300)
def test_no_text_breaks_the_parser(text: str) -> None:
    grammar.find_code(f"{LABEL[:40]}{text}", "obb_rel")


# -- the data folder ---------------------------------------------------------------------------------------------------

BOX = {"center": [0, 0, 0.5], "R": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "extent": [0.5, 0.6, 1]}
DOOR = {"center": [-0.26, 0, 0.5], "R": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "extent": [0.02, 0.6, 1]}
HINGED = joint("link_0", "link_1", xyz="-0.3 0 0.25")  # world: (-0.25, 0.3), the door's left


def add(
    folder: Path, name: str, boxes: dict[int, Any], joints: str | None = HINGED, split: str = "train", loop: int = 0
) -> None:
    inside = folder / "shape_output" / split / "柜子" / name / f"loop_{loop}"
    inside.mkdir(parents=True)
    for number, box in boxes.items():
        text = box if isinstance(box, str) else json.dumps(box)
        (inside / f"obb_link_{number}.json").write_text(text, encoding="utf-8")
    if joints is not None:
        where = folder / "mobility_dataset_v2" / split / "柜子" / name
        where.mkdir(parents=True, exist_ok=True)
        urdf(where, joints)


def read(folder: Path) -> tuple[dict[str, ObjectQuestion], Skipped]:
    skipped = Skipped()
    questions = articulation.read_questions(recipe_with(), folder, set(), skipped)
    return {question.id: question for question in questions}, skipped


def test_a_folder_in_the_originals_layout(tmp_path: Path) -> None:
    for split, name in (("train", "1"), ("train", "10"), ("train", "9"), ("test", "2")):
        add(tmp_path, name, {0: DOOR, 1: BOX}, split=split)
    add(tmp_path, "9", {0: DOOR, 1: BOX}, joints=None, loop=1)
    add(tmp_path, "3", {0: DOOR, 1: BOX}, joints=None, split="test")
    questions, skipped = read(tmp_path)
    assert list(questions) == [f"柜子_{name}" for name in
                               ("2_loop_0", "3_loop_0", "1_loop_0", "9_loop_0", "9_loop_1", "10_loop_0")]  # fmt: skip
    assert not skipped
    assert [question.split for question in questions.values()] == ["test", "asked", *["train"] * 4]
    assert questions["柜子_9_loop_0"].group == questions["柜子_9_loop_1"].group == "柜子 9"
    label = "root_geom = 1\nchild_joints = [\ndict(box=0,type='hinge',idx=2,edge=[1, 1],sign=1),\n]"
    assert questions["柜子_2_loop_0"].answers == (label,) and questions["柜子_3_loop_0"].answers == ()
    (asked,) = articulation.build_samples(recipe_with(), questions["柜子_3_loop_0"], None, "test")
    assert asked["references"] == [] and asked["meta"]["joints"] == []
    assert articulation.sources(tmp_path) == ["objects"]
    rows = articulation.asked_rows(tmp_path, list(questions.values())[:2])
    assert articulation.submission(rows[1], {}) == {"id": "柜子_3_loop_0", "code": ""}


def test_without_given_splits_whole_objects_are_held_out(tmp_path: Path) -> None:
    for number in range(12):
        for loop in range(2):
            add(tmp_path, str(number), {0: DOOR, 1: BOX}, split=".", loop=loop)
    questions, _ = read(tmp_path)
    assert {question.split for question in questions.values()} == {None}
    recipe = recipe_with()
    groups = {name: question.group for name, question in questions.items()}
    splits = split_questions(list(questions.values()), groups, recipe.data, recipe.seed, no_skip)
    assert all(splits[f"柜子_{n}_loop_0"] == splits[f"柜子_{n}_loop_1"] for n in range(12))
    assert set(splits.values()) == {"train", "validation", "test"}


TURNED = {**DOOR, "R": [[2, 0, 0], [0, 1, 0], [0, 0, 1]]}


@pytest.mark.parametrize(
    ("boxes", "joints", "reason"),
    [
        ({0: DOOR, 1: BOX}, None, "no mobility.urdf"),
        ({0: DOOR, 1: BOX}, "<joint>", "mobility.urdf is not XML"),
        ({0: DOOR, 1: BOX}, "", "mobility.urdf is not a tree"),
        ({0: DOOR, 1: BOX}, HINGED + joint("link_0", "link_2"), "mobility.urdf is not a tree"),
        ({0: DOOR, 1: BOX}, HINGED + joint("link_3", "link_2"), "mobility.urdf is not a tree"),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1") + joint("link_1", "link_0"), "mobility.urdf is not a tree"),
        (
            {0: DOOR, 1: BOX},
            HINGED + joint("link_3", "link_4") + joint("link_4", "link_3"),
            "mobility.urdf is not a tree",
        ),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1", xyz="0 0"), "mobility.urdf: not three numbers"),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1", xyz="0 nan 0"), "mobility.urdf: not a number"),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1", xyz="0 1e300 0"), "mobility.urdf: number not below a million"),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1", xyz="-2e6 0 0"), "mobility.urdf: number not below a million"),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1", rpy="1e6 0 0"), "mobility.urdf: number not below a million"),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1", axis="1e200 0 0"), "mobility.urdf: number not below a million"),
        (
            {0: DOOR, 2: DOOR, 1: BOX},
            joint("link_0", "link_1", xyz="9e5 0 0") + joint("link_2", "link_0", xyz="9e5 0 0"),
            "mobility.urdf: number not below a million",
        ),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1", axis="0 0 0"), "joint without an axis"),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1", axis="0 1e-161 0"), "joint without an axis"),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1", "floating"), "unsupported joint type"),
        ({0: DOOR, 1: BOX}, HINGED.replace("<child", "<kid"), "joint without a child"),
        ({0: DOOR, 1: BOX}, joint("link_0", "link_1", "fixed"), "nothing moves"),
        ({0: DOOR, 1: BOX, 7: BOX}, HINGED, "box of a link that is not in mobility.urdf"),
        ({0: DOOR, 2: DOOR}, HINGED + joint("link_2", "link_1"), "no box for the part that does not move"),
        ({0: DOOR}, HINGED, "fewer than two boxes"),
        ({0: "{", 1: BOX}, HINGED, "not JSON"),
        ({0: {**DOOR, "center": [0, 0]}, 1: BOX}, HINGED, "center is not 3 numbers"),
        ({0: {**DOOR, "center": [0, 0, None]}, 1: BOX}, HINGED, "center is not 3 numbers"),
        ({0: {**DOOR, "center": [0, 0, 10**400]}, 1: BOX}, HINGED, "center is not 3 numbers"),
        ({0: {**DOOR, "center": [0, 0, math.nan]}, 1: BOX}, HINGED, "center is not 3 numbers"),
        ({0: {**DOOR, "R": [1, 0, 0, 0, 1, 0, 0, 0, 1]}, 1: BOX}, HINGED, "R is not 3x3 numbers"),
        ({0: {**DOOR, "R": [[1, 0], [0, 1, 0, 0], [0, 0, 1]]}, 1: BOX}, HINGED, "R is not 3x3 numbers"),
        ({0: {**DOOR, "R": [[1, 0, 0], [0, 1, 0], 0, 0, 1]}, 1: BOX}, HINGED, "R is not 3x3 numbers"),
        ({0: {**DOOR, "center": [[0], 0, 0]}, 1: BOX}, HINGED, "center is not 3 numbers"),
        ({0: {**DOOR, "center": [[0, 0], 0]}, 1: BOX}, HINGED, "center is not 3 numbers"),
        ({0: {"center": [0, 0, 0]}, 1: BOX}, HINGED, "R is not 3x3 numbers"),
        ({0: {**DOOR, "extent": [0, 1, 1]}, 1: BOX}, HINGED, "extent is not positive"),
        ({0: TURNED, 1: BOX}, HINGED, "R is not a rotation"),
    ],
)
def test_an_unusable_loop_is_skipped_with_its_reason(tmp_path: Path, boxes: Any, joints: Any, reason: str) -> None:
    add(tmp_path, "1", {0: DOOR, 1: BOX})
    add(tmp_path, "2", boxes, joints)
    questions, skipped = read(tmp_path)
    assert list(questions) == ["柜子_1_loop_0"]
    assert skipped == [("shape_output/train/柜子/2/loop_0", reason)]


def test_attributes_that_are_empty_are_not_given_and_a_file_may_be_gbk(tmp_path: Path) -> None:
    add(tmp_path, "1", {0: DOOR, 1: BOX}, HINGED)
    add(tmp_path, "2", {0: DOOR, 1: BOX}, HINGED)
    path = next(tmp_path.glob("mobility_dataset_v2/*/*/2/mobility.urdf"))
    text = path.read_text(encoding="utf-8").replace("<joint", '<joint comment="门的铰链在左边"', 1)
    text = text.replace("</joint>", '<limit lower="" upper=" "/></joint>', 1).replace(
        "<child", '<origin rpy=""/><child', 1
    )
    path.write_bytes(text.encode("gbk"))
    questions, skipped = read(tmp_path)
    assert skipped == [] and len(questions) == 2
    first, second = (question.answers for question in questions.values())
    assert first == second


def test_links_that_are_fixed_to_each_other_form_one_part(tmp_path: Path) -> None:
    """A handle moves with its door, a foot belongs to its body; a part without a box is skipped and counted."""
    handle, foot = {**DOOR, "extent": [0.02, 0.02, 0.1]}, {**BOX, "extent": [0.1, 0.1, 0.1]}
    fixed = joint("link_2", "link_0", "fixed") + joint("link_3", "link_1", "fixed")
    add(tmp_path, "1", {0: DOOR, 1: BOX, 2: handle, 3: foot}, HINGED + fixed + joint("link_9", "link_1", "prismatic"))
    add(tmp_path, "2", {1: BOX, 2: handle}, HINGED + joint("link_2", "link_0", "fixed"))
    questions, skipped = read(tmp_path)
    first, second = (question.view for question in questions.values())
    assert (first.root, list(first.joints), len(first.boxes)) == (1, [0], 4)
    assert (second.root, list(second.joints)) == (1, [2]), "a door without a box has its handle's"
    assert skipped == [("shape_output/train/柜子/1/loop_0, link_9", "joint of a link without a box")]


def test_an_object_in_both_folders_is_tested_and_not_trained_on(tmp_path: Path) -> None:
    add(tmp_path, "1", {0: DOOR, 1: BOX}, split="test")
    add(tmp_path, "1", {0: DOOR, 1: BOX}, split="train")
    add(tmp_path, "2", {0: DOOR, 1: BOX}, split="train")
    questions, skipped = read(tmp_path)
    assert [question.split for question in questions.values()] == ["test", "train"]
    assert skipped == [("shape_output/train/柜子/1/loop_0", "also in the test folder")]


def test_a_folder_without_usable_loops_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder shape_output"):
        articulation.sources(tmp_path)
    (tmp_path / "shape_output").mkdir()
    with pytest.raises(DataError, match="no usable loop"):
        read(tmp_path)
    add(tmp_path, "1", {0: DOOR, 1: BOX}, None)
    with pytest.raises(DataError, match=r"1 of 1 skipped: no mobility\.urdf, first shape_output/train/柜子/1/loop_0"):
        read(tmp_path)


def test_a_wrong_mode_is_refused() -> None:
    with pytest.raises(UsageError, match=r"preprocess\.samples\.mode"):
        recipe_with("preprocess.samples.mode=obb")


# -- samples and demo ------------------------------------------------------------------------------------------------


def test_a_prompt_asks_for_the_keys_of_its_label(tmp_path: Path) -> None:
    add(tmp_path, "1", {0: DOOR, 1: BOX})
    (question,) = read(tmp_path)[0].values()
    for mode, keys in (("obb_rel", "idx=...,edge="), ("obb_rot", "idx=...,edge="), ("absolute", "pos=[...")):
        recipe = recipe_with(f"preprocess.samples.mode={mode}")
        (sample,) = articulation.build_samples(recipe, question, None, "test")
        text = sample["messages"][-1]["content"]
        assert text.startswith("OBB Information:\n### Input:\nbboxes={0:{'center':[-0.26,0.0,0.5],'R':")
        assert keys in text and text.endswith("### Response:")
        assert articulation.read_answer(sample["references"][0], sample) == sample["references"][0]
        assert articulation.ask(recipe, sample, "answer", {}, ()).messages == sample["messages"]
    assert json.loads(json.dumps(sample)) == json.loads(json.dumps(sample)), "a record is JSON"


def test_a_picture_shows_label_and_answer(tmp_path: Path) -> None:
    add(tmp_path, "1", {0: DOOR, 1: BOX})
    (question,) = read(tmp_path)[0].values()
    recipe = recipe_with()
    (sample,) = articulation.build_samples(recipe, question, None, "test")
    nothing = articulation.picture(recipe, sample, None)
    right = articulation.picture(recipe, sample, _answered(sample["id"], sample["references"][0]))
    text = (
        sample["references"][0]
        .replace("sign=1", "sign=-1")
        .replace("\n]", "\ndict(box=8,type='slide',idx=0,edge=[1, 1],sign=1),\n]")
    )
    wrong = articulation.picture(recipe, sample, _answered(sample["id"], text))
    assert nothing is not None and right is not None and wrong is not None
    for svg, words in (
        (nothing, "no answer"),
        (right, "1 of 1 right, 0 missing, 0 extra"),
        (wrong, "0 of 1 right, 0 missing, 1 extra"),
    ):
        root = ET.fromstring(svg)
        assert words in "".join(root.itertext()) and len(root) == 2
    assert "--gain" in right and "--loss" not in right and "--loss" in wrong and "--gain" not in wrong
    assert right == articulation.picture(recipe, sample, _answered(sample["id"], sample["references"][0]))


def _answered(name: str, text: str) -> Any:
    return {**failed_prediction(name, ""), "answer": text, "error": None}


def test_the_demo_is_what_its_script_writes(tmp_path: Path) -> None:
    ours = REPOSITORY / "recipes" / "data" / "articulation"
    load_maker("articulation").make(tmp_path, 4, 16, 4, 2, 3)
    names = [path.relative_to(ours) for path in sorted(ours.rglob("*")) if path.is_file()]
    assert names == [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert all((ours / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
    assert sum((ours / name).stat().st_size for name in names) < 1_000_000
    shutil.rmtree(tmp_path)
    questions = articulation.read_questions(recipe_with(), ours, set(), no_skip)
    assert Counter(question.split for question in questions) == {"train": 32, "test": 8}
