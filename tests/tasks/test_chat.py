"""chat: forms that are read back byte for byte, tools, pictures, data paths, splits, near-duplicates and samples."""

import base64
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.contract.errors import DataError, UsageError
from stages.contract.recipe import Data, Recipe, load_recipe
from stages.contract.records import PLACE, Message, unescape_places
from stages.preprocess.split import split_questions
from stages.tasks import chat, settle_recipe
from stages.tasks.chat.conversations import ChatQuestion, grouped_questions, with_small_sets_together
from tests.conftest import REPOSITORY
from tests.tasks.odd_files import CELL_WRITERS, CELLS, FORMS, PNG, WRITERS, expected, lines, parquet
from tests.tasks.test_odd_files import said

Read = tuple[list[ChatQuestion], list[tuple[str, str]], list[str]]


def recipe(**samples: Any) -> Recipe:
    return Recipe.model_validate({
        "task": "chat",
        "model": {"path": "m"},
        "data": {"path": "d"},
        "preprocess": {"samples": samples},
        "train": {"adapters": [{"name": "tuned"}]},
    })  # fmt: skip


@pytest.fixture
def pictures() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def read(path: Path, pictures: Path, **samples: Any) -> Read:
    """Conversations, skipped records, and what was said."""
    skipped: list[tuple[str, str]] = []
    lines: list[str] = []
    found = chat.read_conversations(
        recipe(**samples), path, pictures, lambda what, reason, detail="": skipped.append((what, reason)), lines.append
    )
    return found, skipped, lines


def one(path: Path, pictures: Path, *records: Any, **samples: Any) -> ChatQuestion:
    """The one conversation of a file with these records."""
    path.write_text(lines(list(records)), encoding="utf-8")
    ((question,), skipped, _) = read(path, pictures, **samples)
    assert not skipped
    return question


def turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]}


# -- byte for byte -----------------------------------------------------------------------------------------------

TEXT = st.text(max_size=40).filter(lambda text: text.strip() != "")
ODD = [" ", "\n", "\r\n", "\t", "```\n    x\n```", "<image>", "\u2060", '"', ",", "\\n", "中文", "[{"]
PIECES = st.sampled_from(ODD)
CONTENT = st.one_of(TEXT, st.lists(st.one_of(PIECES, TEXT), min_size=1, max_size=6).map("".join)).filter(str.strip)


@given(
    st.lists(CONTENT, min_size=1, max_size=4),
    st.lists(CONTENT, min_size=4, max_size=4),
    st.one_of(st.just(""), CONTENT),
    st.sampled_from([*product(FORMS, WRITERS), *product(CELLS, CELL_WRITERS)]),
)
@settings(max_examples=60)
def test_any_conversation_in_any_form_is_read_back(
    questions: list[str], answers: list[str], system: str, written: tuple[str, str]
) -> None:
    form, kind = written
    conversation = [
        part for pair in zip(questions, answers, strict=False) for part in zip(("user", "assistant"), pair, strict=True)
    ]
    ending, encode = {**WRITERS, **CELL_WRITERS}[kind]
    with tempfile.TemporaryDirectory() as folder:
        path, stored = Path(folder) / f"a.{ending}", Path(folder) / "pictures"
        stored.mkdir()
        path.write_bytes(encode([FORMS[form](conversation, system)]))
        ((question,), skipped, _) = read(path, stored)
    assert not skipped
    assert said(question) == expected(conversation, system)


@given(st.lists(CONTENT, min_size=1, max_size=4))
@settings(max_examples=30)
def test_any_plain_text_is_read_back(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text(lines([{"text": text} for text in texts]), encoding="utf-8")
        found, _, _ = read(path, Path(tempfile.mkdtemp(dir=folder)))
    assert [question.plain for question in found] == texts


def test_a_word_that_marks_a_picture_is_text_without_pictures(tmp_path: Path, pictures: Path) -> None:
    question = one(tmp_path / "a.jsonl", pictures, turns("<image> <\u2060image>", "<image>"))
    assert all(PLACE not in message["content"] for message in question.messages)
    assert [unescape_places(message["content"]) for message in question.messages] == [
        "<image> <\u2060image>",
        "<image>",
    ]


# -- tools -------------------------------------------------------------------------------------------------------

ARGUMENTS = {"city": "Łódź", "days": 2, "deep": {"list": [1, None, 2.5], "text": "a\n<image>"}}
TOOL = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {}}}}


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


ASKED, DONE = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOLD = {"role": "tool", "content": "warm"}
WITH_TOOLS: dict[str, Any] = {
    "arguments as a string": {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [
        calling(json.dumps(ARGUMENTS))]}, TOLD, DONE], "tools": [{"type": "function", "function": TOOL}]},
    "arguments as an object": {"messages": [ASKED, {"role": "assistant", "tool_calls": [
        calling(ARGUMENTS)]}, TOLD, DONE], "functions": [TOOL]},
    "function_call": {"messages": [ASKED, {"role": "assistant", "content": "", "function_call": {
        "name": "weather", "arguments": json.dumps(ARGUMENTS)}}, {**TOLD, "role": "function"}, DONE], "tools": [TOOL]},
    "ms-swift": {"messages": [ASKED, {"role": "tool_call", "content": json.dumps(
        {"name": "weather", "arguments": ARGUMENTS})}, {**TOLD, "role": "tool_response"}, DONE],
        "tools": json.dumps([TOOL])},
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(
        {"name": "weather", "arguments": json.dumps(ARGUMENTS)})}, {"from": "observation", "value": "warm"},
        {"from": "gpt", "value": "a"}], "tools": json.dumps([json.dumps(TOOL)])},
}  # fmt: skip


@pytest.mark.parametrize("record", WITH_TOOLS.values(), ids=WITH_TOOLS.keys())
def test_tool_calls_become_openais_with_arguments_as_objects(tmp_path: Path, pictures: Path, record: Any) -> None:
    question = one(tmp_path / "a.jsonl", pictures, record)
    assert question.messages == (
        ASKED, {"role": "assistant", "content": "", "tool_calls": [calling(ARGUMENTS)]}, TOLD, DONE,
    )  # fmt: skip
    assert question.tools == ({"type": "function", "function": TOOL},)


def test_ids_of_calls_names_and_thoughts_are_kept(tmp_path: Path, pictures: Path) -> None:
    messages = [
        {**ASKED, "name": "Ann"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [calling({}, id="c1"), calling({"city": "x"}, id="c2")],
        },
        {**TOLD, "tool_call_id": "c1", "name": "weather"},
        {**TOLD, "tool_call_id": "c2", "name": "weather"},
        {**DONE, "reasoning_content": " first\nthen "},
    ]
    assert list(one(tmp_path / "a.jsonl", pictures, {"messages": messages}).messages) == messages


def test_calls_in_a_row_are_calls_of_one_turn(tmp_path: Path, pictures: Path) -> None:
    call = {"role": "tool_call", "content": json.dumps({"name": "weather", "arguments": {"city": "x"}})}
    record = {"messages": [ASKED, {"role": "assistant", "content": "I look."}, call, call, TOLD, TOLD, DONE]}
    assert one(tmp_path / "a.jsonl", pictures, record).messages[1] == {
        "role": "assistant", "content": "I look.", "tool_calls": [calling({"city": "x"})] * 2,
    }  # fmt: skip


def test_nulls_that_a_table_adds_are_no_arguments(tmp_path: Path, pictures: Path) -> None:
    records = [
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [calling({key: 1})]}], "tools": [
            {"type": "function", "function": {"name": "weather", "parameters": {"properties": {key: {"type": "x"}}}}},
        ]}
        for key in ("a", "b")
    ]  # fmt: skip
    (tmp_path / "a.parquet").write_bytes(parquet(records))
    found, skipped, _ = read(tmp_path / "a.parquet", pictures)
    assert not skipped
    for question, record in zip(found, records, strict=True):
        assert question.messages[1].get("tool_calls") == record["messages"][1]["tool_calls"]
        assert list(question.tools) == record["tools"]


def test_a_call_may_be_the_answer(tmp_path: Path, pictures: Path) -> None:
    record = {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [calling(ARGUMENTS)]}, TOLD]}
    question = one(tmp_path / "a.jsonl", pictures, record)
    assert json.loads(question.answers[0]) == [calling(ARGUMENTS)]
    (sample,) = chat.build_samples(recipe(), question, None, "test")
    assert sample["references"] == [] and sample["meta"]["answer"] == question.messages[-1]


# -- pictures ----------------------------------------------------------------------------------------------------


def draw(path: Path, colour: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), colour).save(path)
    return path


def part(**image: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "What <image>"}, {"type": "image_url", **image}]}


URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
SEEN = [{"role": "user", "content": "What <\u2060image><image>"}, DONE]
WITH_PICTURES: dict[str, tuple[Any, list[Message]]] = {
    "image_url": ({"messages": [part(image_url={"url": "red.png"}), DONE]}, SEEN),
    "image_url as text": ({"messages": [part(image_url="sub/../red.png"), DONE]}, SEEN),
    "data URI": ({"messages": [part(image_url={"url": URI, "detail": "low"}), DONE]}, SEEN),
    "images": ({**turns("<image>\nWhat?", "<image>"), "images": ["red.png"]}, [
        {"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "<\u2060image>"},
    ]),
    "images without a place": ({**turns("What?", "a"), "images": ["red.png"]}, [
        {"role": "user", "content": "<image>What?"}, DONE,
    ]),
    "a part without a path": ({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "What <image>"}, {"type": "image"}]}, DONE,
    ], "images": ["red.png"]}, SEEN),
    "LLaVA": ({"image": "red.png", "conversations": [
        {"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "a"},
    ]}, [{"role": "user", "content": "What?\n<image>"}, DONE]),
}  # fmt: skip


@pytest.mark.parametrize(("record", "wanted"), WITH_PICTURES.values(), ids=WITH_PICTURES.keys())
def test_a_picture_has_one_place(tmp_path: Path, pictures: Path, record: Any, wanted: list[Message]) -> None:
    draw(tmp_path / "red.png", "red")
    question = one(tmp_path / "a.jsonl", pictures, record)
    assert list(question.messages) == wanted
    (name,) = question.images
    content = PNG if "data:" in json.dumps(record) else (tmp_path / "red.png").read_bytes()
    assert (pictures / name).read_bytes() == content


@pytest.mark.parametrize("name", ["red.png", "file://{}/set/red.png", "{}/set/red.png", "red%20x.png", "blue.png"])
def test_where_a_picture_is_looked_for(tmp_path: Path, pictures: Path, name: str) -> None:
    """Beside the file that names it, then in the data folder."""
    draw(tmp_path / "red.png", "green"), draw(tmp_path / "set" / "red.png", "red"), draw(tmp_path / "blue.png", "blue")
    draw(tmp_path / "set" / "red%20x.png", "red")
    record = {**turns("q", "a"), "images": [name.format(tmp_path)]}
    (tmp_path / "set" / "a.jsonl").write_text(lines([record]))
    ((question,), skipped, said) = read(tmp_path, pictures)
    assert not skipped and "1 with pictures without a place" in said[0]
    with Image.open(pictures / question.images[0]) as shown:
        assert shown.convert("RGB").getpixel((0, 0)) == ((0, 0, 255) if name == "blue.png" else (255, 0, 0))


def test_pictures_inside_a_table(tmp_path: Path, pictures: Path) -> None:
    records = [
        {**turns("<image>q", "a"), "images": [{"bytes": PNG, "path": None}]},
        {**turns("<image>", "b"), "image": PNG},
    ]
    for name, record in zip(("a", "b"), records, strict=True):
        (tmp_path / f"{name}.parquet").write_bytes(parquet([record]))
    found, skipped, _ = read(tmp_path, pictures)
    assert not skipped and len(found) == 2
    assert [(pictures / name).read_bytes() for question in found for name in question.images] == [PNG, PNG]
    assert len({question.group for question in found}) == 2  # of two, one picture is what half of all have


def test_conversations_about_one_picture_are_one_group(tmp_path: Path, pictures: Path) -> None:
    draw(tmp_path / "red.png", "red"), draw(tmp_path / "blue.png", "blue")
    records = [{**turns(f"q{n}", f"a{n}"), "images": [f"{'red' if n < 2 else 'blue'}.png"]} for n in range(4)]
    (tmp_path / "a.jsonl").write_text(lines(records))
    found, _, _ = read(tmp_path / "a.jsonl", pictures)
    groups = [question.group for question in found]
    assert groups[0] == groups[1] != groups[2] == groups[3]


# -- data paths and splits ---------------------------------------------------------------------------------------


def test_a_file_is_one_data_set(tmp_path: Path, pictures: Path) -> None:
    path = tmp_path / "my chats.jsonl"
    path.write_text(lines([turns(f"q{n}", f"a{n}") for n in range(3)]))
    (tmp_path / "other.jsonl").write_text("not read")
    found, _, said = read(path, pictures)
    assert chat.sources(path) == ["my chats"] and {question.source for question in found} == {"my chats"}
    assert said == ["my chats.jsonl: messages, 3 conversations"]
    with pytest.raises(DataError, match=r"a\.md: no data set, as its ending is another"):
        (tmp_path / "a.md").write_text("x")
        chat.sources(tmp_path / "a.md")


def test_entries_of_a_folder_are_data_sets(tmp_path: Path, pictures: Path) -> None:
    for name in ("a.jsonl", "b.csv", "c/x.json", "c/sub/y.json", "README.md", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"question,answer\n{name},a\n" if name == "b.csv" else lines([turns(name, "a")]))
    datasets.Dataset.from_list([turns("d", "e")]).save_to_disk(tmp_path / "d")
    found, skipped, said = read(tmp_path, pictures)
    assert [(one.id.partition("/")[0], one.text) for one in found] == [
        ("a", "a.jsonl"), ("b", "b.csv"), ("c", "c/sub/y.json"), ("c", "c/x.json"), ("d", "d"),
    ]  # fmt: skip
    assert skipped == [("notes.txt", "not a data set")]
    assert [line.partition(":")[0] for line in said[:4]] == ["a.jsonl", "b.csv", "c", "d"]


def test_many_small_files_are_split_together(tmp_path: Path, pictures: Path) -> None:
    """One conversation a file: each could be for training or for test only."""
    for number in range(30):
        (tmp_path / f"{number:02}.json").write_text(json.dumps(turns(f"q{number}", f"a{number}"), indent=1))
    (tmp_path / "large.jsonl").write_text(lines([turns(f"{number}", f"b{number}") for number in range(20)]))
    found, _, said = read(tmp_path, pictures)
    assert len(said) == 21 and said[-1] == "11 other data sets: messages, 30 conversations"
    assert {question.source for question in found} == {"data", "large"}
    splits = split_questions(found, {one.id: one.group for one in found}, Data(path="d"), 1, lambda *_: None)
    assert 0.2 < sum(split == "test" for split in splits.values()) / len(splits) < 0.3


def test_a_small_data_set_of_a_mix_stays_by_itself() -> None:
    few = [replace(question, source=f"s{n // 2}") for n, question in enumerate(questions(*[("q", "a")] * 8))]
    assert {one.source for one in with_small_sets_together(few, {"s1"})} == {"data", "s1"}
    assert {one.source for one in with_small_sets_together(few, {"s0", "s1", "s2"})} == {"s0", "s1", "s2", "s3"}
    stated = [replace(one, split="test") if one.source == "s3" else one for one in few]
    assert {one.source for one in with_small_sets_together(stated, {})} == {"data", "s3"}


def test_given_splits_are_kept(tmp_path: Path, pictures: Path) -> None:
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text(lines([turns(name, "a")]))
    found, _, _ = read(tmp_path, pictures)
    assert {one.text: one.split for one in found} == {
        "train-00000-of-00002.jsonl": "train",
        "train-00001-of-00002.jsonl": "train",
        "test.jsonl": "test",
        "validation.jsonl": "train",
    }
    assert chat.sources(tmp_path) == ["data"]


def test_a_folder_saved_by_datasets_with_splits(tmp_path: Path, pictures: Path) -> None:
    parts = {split: datasets.Dataset.from_list([turns(split, "a")]) for split in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path):
        found, _, _ = read(path, pictures)
        assert {one.text: one.split for one in found} == {"train": "train", "test": "test"}


def test_ids_are_the_datas_own_where_they_are_unique(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        lines([{**turns(f"q{n}", "a"), "id": name} for n, name in enumerate(["x", 7, "x"])])
    )
    assert [one.id for one in read(tmp_path / "a.jsonl", pictures)[0]] == ["a/x", "a/7", "a/a-3"]


def test_columns_may_be_named(tmp_path: Path, pictures: Path) -> None:
    record = {"Frage": "q", "Antwort": "a", "text": "other", "Thema": "t"}
    question = one(
        tmp_path / "a.jsonl", pictures, record, columns={"question": "Frage", "answer": "Antwort", "group": "Thema"}
    )
    assert said(question) == [("user", "q"), ("assistant", "a")] and question.group
    record = {"talk": [{"speaker": "human", "said": "q"}, {"speaker": "gpt", "said": "a"}]}
    columns = {"messages": "talk", "role": "speaker", "content": "said"}
    assert said(one(tmp_path / "b.jsonl", pictures, record, columns=columns)) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(
        DataError, match=r"no answer, first d\.jsonl:1 \(found the keys input, target\).* name the columns"
    ):
        one(tmp_path / "d.jsonl", pictures, {"input": "q", "target": "a"})
    with pytest.raises(DataError, match=r"no known form.* name the columns .* preprocess\.samples\.columns"):
        one(tmp_path / "c.jsonl", pictures, {"Frage": "q"})


def test_a_form_may_be_named(tmp_path: Path, pictures: Path) -> None:
    record = {"prompt": "p", "completion": "c", "text": "t", "question": "q", "answer": "a"}
    assert said(one(tmp_path / "a.jsonl", pictures, record)) == [("user", "p"), ("assistant", "c")]
    assert said(one(tmp_path / "a.jsonl", pictures, record, form="question")) == [("user", "q"), ("assistant", "a")]
    assert said(one(tmp_path / "a.jsonl", pictures, record, form="text")) == "t"
    with pytest.raises(DataError, match="1 of 1 skipped: no messages"):
        one(tmp_path / "a.jsonl", pictures, record, form="sharegpt")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("preprocess.samples.form=sharegtp", "preprocess.samples.form: found 'sharegtp'"),
        ("preprocess.samples.columns={frage: q}", "found 'frage'; name one of messages"),
        ("preprocess.samples.near_duplicates=2", "near_duplicates: found 2"),
    ],
)
def test_wrong_settings_are_refused(setting: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        settle_recipe(load_recipe(REPOSITORY / "recipes" / "chat.yaml", None, (setting,)), "chat.yaml", Path())
    assert words in str(caught.value)


def test_what_was_found_is_said(tmp_path: Path, pictures: Path) -> None:
    records = [
        {"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": f"a{n}"}]} for n in range(1200)
    ]
    unanswered = [{"conversations": [{"from": "human", "value": f"q{n}"}]} for n in range(3)]
    twice = [turns("q", "a", "b"), {"messages": [ASKED, DONE, ASKED], "weight": 1}]
    (tmp_path / "chats.jsonl").write_text(lines([*records, *unanswered, *twice, {"x": 1}]))
    _, skipped, said = read(tmp_path / "chats.jsonl", pictures)
    assert said[0] == (
        "chats.jsonl: ShareGPT (1,200), messages (2), 1,202 conversations, 3 without an answer, 1 unusable;"
        " 2 with turns after the last answer, left out"
    )
    assert [what for what, reason in skipped if reason == "no answer"] == [
        f"chats.jsonl:{n}" for n in (1201, 1202, 1203)
    ]
    assert said[1].startswith("2 of 1,202 conversations have the prompt or nearly the text of others, in 1 group;")


def test_ignored_weights_are_said(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"messages": [ASKED, {**DONE, "weight": 0}]}]))
    assert read(tmp_path / "a.jsonl", pictures)[2] == [
        "a.jsonl: messages, 1 conversation; 1 with weights of messages, which are ignored"
    ]


# -- near-duplicates ---------------------------------------------------------------------------------------------


def questions(*conversations: tuple[str, ...], split: Any = None) -> list[ChatQuestion]:
    return [
        ChatQuestion(f"a/{n}", "a", "", split, tuple(turns(*texts)["messages"]))
        for n, texts in enumerate(conversations)
    ]


def some_text(seed: int, words: int = 120) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(words))


def chinese_text(seed: int, characters: int = 300) -> str:
    draw = random.Random(seed)
    return "".join(chr(draw.randint(0x4E00, 0x9000)) for _ in range(characters))


@pytest.mark.parametrize("make", [some_text, chinese_text])
def test_near_duplicates_are_one_group(make: Any) -> None:
    texts = [make(seed) for seed in range(20)]
    near = texts[0][:40] + "XX" + texts[0][42:]
    half = texts[1][: len(texts[1]) // 2] + make(99)[: len(texts[1]) // 2]
    found = grouped_questions(
        questions(*[(f"{n}", text) for n, text in enumerate(texts)], ("20", near), ("21", half)), 0.8, lambda _: None
    )
    groups = [question.group for question in found]
    assert groups[20] == groups[0]
    assert len(set(groups)) == 21


def test_the_same_text_or_prompt_is_one_group_and_what_most_share_is_not() -> None:
    every = [("Tell me a joke.", f"joke {n} {some_text(n, 20)}") for n in range(40)]
    few = [("Who?", "I"), ("ｗｈｏ? ", "You"), ("a", "b"), ("A", "B ")]
    found = [one.group for one in grouped_questions(questions(*every, *few), None, lambda _: None)]
    assert len(set(found[:40])) == 40
    assert found[40] == found[41] != found[42] == found[43]


def test_the_words_of_an_instruction_make_no_near_duplicates() -> None:
    instruction = "Classify the review that follows as good or bad, and answer with this one word only, please: " * 5
    found = grouped_questions(
        questions(*[(instruction + some_text(n, 30), "good") for n in range(60)]), 0.8, lambda _: None
    )
    assert len({one.group for one in found}) == 60


def test_no_near_duplicate_of_a_test_conversation_is_trained_on() -> None:
    texts = [some_text(seed) for seed in range(30)]
    pairs = questions(
        *[(f"{n}", text) for n, text in enumerate(texts)], *[(f"x{n}", t + "!") for n, t in enumerate(texts)]
    )
    said: list[str] = []
    found = grouped_questions(pairs, 0.8, said.append)
    assert said == [
        "60 of 60 conversations have the prompt or nearly the text of others, in 30 groups; no group is on both sides"
        " of a split"
    ]
    splits = split_questions(found, {one.id: one.group for one in found}, Data(path="d"), 1, lambda *_: None)
    for n in range(30):
        assert splits[f"a/{n}"] == splits[f"a/{n + 30}"]
    assert set(splits.values()) == {"train", "validation", "test"}


def test_given_training_conversations_like_test_ones_are_said_and_left_out() -> None:
    text = some_text(1)
    tested = [ChatQuestion("a/t", "a", "", "test", tuple(turns("q", text)["messages"]))]
    given = questions(("p", text + "?"), *[(f"{n}", some_text(n)) for n in range(2, 9)], split="train")
    said: list[str] = []
    found = grouped_questions([*tested, *given], 0.8, said.append)
    assert "; 1 of them, given for training, is like test conversations;" in said[0]
    skipped: list[str] = []
    splits = split_questions(found, {one.id: one.group for one in found}, Data(path="d"), 1, skipped.append)  # type: ignore[arg-type]
    assert splits["a/t"] == "test" and splits["a/0"] is None


def test_groups_do_not_depend_on_the_order() -> None:
    texts = [some_text(seed % 7) + f" {seed}" for seed in range(14)]
    pairs = questions(*[(f"{n}", text) for n, text in enumerate(texts)])
    forward = {one.id: one.group for one in grouped_questions(pairs, 0.8, lambda _: None)}
    backward = {one.id: one.group for one in grouped_questions(pairs[::-1], 0.8, lambda _: None)}
    assert forward == backward


def test_a_stated_group_is_one_group(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{**turns(f"q{n}", f"a{n}"), "group": n // 2} for n in range(6)]))
    assert len({one.group for one in read(tmp_path / "a.jsonl", pictures)[0]}) == 3


# -- samples -----------------------------------------------------------------------------------------------------


def test_a_sample_for_training_is_whole_and_one_for_test_is_asked() -> None:
    (question,) = questions(("q", "a", "q <image>", " <image> b\n"))
    (train,) = chat.build_samples(recipe(), question, None, "train")
    (test,) = chat.build_samples(recipe(), question, None, "test")
    assert train["messages"] == list(question.messages)
    assert test["messages"] == list(question.messages[:-1])
    assert test["meta"]["answer"] == question.messages[-1]
    assert test["references"] == [" <image> b\n"] and test["meta"]["question"] == "q <image>"
    assert "tools" not in train and "text" not in train


def test_a_plain_text_is_no_conversation() -> None:
    question = ChatQuestion("a/1", "a", "g", None, (), plain="Once.\n")
    for split in ("train", "test"):
        (sample,) = chat.build_samples(recipe(), question, None, split)
        assert (sample["messages"], sample["text"], sample["references"]) == ([], "Once.\n", [])


def test_an_answer_is_read_without_reasoning_and_otherwise_unchanged() -> None:
    (question,) = questions(("q", "a"))
    (sample,) = chat.build_samples(recipe(), question, None, "test")
    assert chat.read_answer(" a\n\n b ", sample) == " a\n\n b "
    assert chat.read_answer("<think>x</think>\n\nb", sample) == "b"
    assert chat.read_answer(" \n", sample) is None
    assert chat.score(recipe(), "a", sample) == {"chrf": 1, "rouge_l": 1, "exact_match": 1, "f1": 1}
    assert set(chat.score(recipe(), "b", sample).values()) == {0}


def test_the_demo_has_three_forms(pictures: Path) -> None:
    found, skipped, said = read(REPOSITORY / "recipes" / "data" / "chat", pictures)
    assert not skipped and len(found) == 160
    assert said == [
        "house.json: ShareGPT, 40 conversations",
        "shop.jsonl: messages, 80 conversations",
        "shop-zh.csv: Alpaca, 40 conversations",
    ]
