"""Conversations in LLaVA's form, in Data-Juicer's and as messages: conversions lose nothing."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.tasks.better_synth.llava import (
    DJ_END,
    DJ_PLACE,
    Original,
    caption_in,
    from_dj,
    from_messages,
    has_turns,
    restored_record,
    to_dj,
    to_dj_caption,
    to_messages,
)
from stages.tasks.common.json_lines import BadRecordError

PLACE = "<image>"
MARKS = re.compile(r"\[\[[a-zA-Z]*\]\]: |<image>|<__dj__image>|<\|__dj__eoc\|>")
CHINESE = st.text("红色的公交车停在街上，。！？“”\u3000\n", max_size=12)
TROUBLE = st.sampled_from(
    ["[[human]]:", "[[", "\n[[gpt]]:x", "<image", "image>", "<|__dj__", " ", "\n", "\r\n", "\u2028", "<__dj__", "🚌"]
)
TEXTS = (
    st.lists(st.one_of(st.text(max_size=12), CHINESE, TROUBLE), min_size=1, max_size=5)
    .map("".join)
    .filter(lambda text: text.strip() and not MARKS.search(text))
)
TURNS = TEXTS.filter(lambda text: not MARKS.search(f"{text} "))
"""Texts that may end a turn. A blank follows the end, which would turn `[[human]]:` into a mark."""
IDS = st.one_of(st.integers(min_value=0), TEXTS)


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A LLaVA record: several turns with pictures anywhere, also one after the other."""
    turns: list[dict[str, str]] = []
    count = 0
    if draw(st.booleans()):
        turns.append({"from": "system", "value": draw(TURNS)})
    for _ in range(draw(st.integers(1, 4))):
        pieces = [*draw(st.lists(TEXTS, max_size=2)), draw(TURNS)]
        count += len(pieces) - 1
        turns.append({"from": "human", "value": PLACE.join(pieces)})
        turns.append({"from": "gpt", "value": draw(TURNS)})
    names = draw(st.lists(TEXTS, min_size=count, max_size=count))
    image = {"image": names[0] if count == 1 else names} if count else {}
    return {"id": draw(IDS), **image, "conversations": turns}


@given(conversations())
def test_llava_to_messages_and_back(record: dict[str, Any]) -> None:
    assert from_messages(record["id"], *to_messages(record)) == record


@given(conversations())
def test_llava_to_data_juicer_and_back(record: dict[str, Any]) -> None:
    written = json.loads(json.dumps(to_dj(record), ensure_ascii=False))
    assert has_turns(written) and isinstance(written["id"], str)
    assert written["text"].count(DJ_PLACE) == len(written["images"]) and PLACE not in written["text"]
    names = written["images"]
    back = from_dj(written, record["id"])
    if len(set(names)) == len(names):
        assert back == record
    assert to_dj(back)["text"] == written["text"]


@given(st.lists(TEXTS, max_size=3, unique=True), TEXTS, TURNS, IDS)
def test_a_caption_and_its_question_looked_up_are_the_record(
    names: list[str], question: str, caption: str, name: str | int
) -> None:
    human = PLACE * len(names) + question
    record = from_messages(
        name, [{"role": "user", "content": human}, {"role": "assistant", "content": caption}], list(names)
    )
    written = to_dj_caption(record)
    assert written["text"] == f"{DJ_PLACE}\n" * len(names) + f"{caption} {DJ_END}", "the question is not in it"
    assert restored_record(written, {str(name): Original(name, human)}) == record


# -- by hand -----------------------------------------------------------------------------------------------------

BUS = {
    "id": "000000033471",
    "image": "coco/train2017/000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
        {"from": "gpt", "value": "The bus in the image is white and red."},
        {"from": "human", "value": "What feature can be seen on the back of the bus?"},
        {"from": "gpt", "value": "The back of the bus features an advertisement."},
    ],
}
BUS_AS_WRITTEN = (
    "[[human]]: <__dj__image>\nWhat are the colors of the bus in the image?\n"
    "[[gpt]]: The bus in the image is white and red.\n"
    "[[human]]: What feature can be seen on the back of the bus?\n"
    "[[gpt]]: The back of the bus features an advertisement. <|__dj__eoc|>"
)


def test_turns_are_as_data_juicers_own_converter_writes_them() -> None:
    assert to_dj(BUS) == {"id": BUS["id"], "text": BUS_AS_WRITTEN, "images": [BUS["image"]]}
    assert from_dj({"id": BUS["id"], "text": BUS_AS_WRITTEN, "images": [BUS["image"]]}) == BUS


def test_other_variants_of_data_juicers_form_are_read() -> None:
    """`<image>` for a picture, and an end mark after each turn (split_chunk)."""
    chunked = BUS_AS_WRITTEN.replace("red.\n", "red. <|__dj__eoc|>\n").replace(DJ_PLACE, PLACE)
    assert from_dj({"id": BUS["id"], "text": chunked, "images": [BUS["image"]]}) == BUS


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("<__dj__image>\na red bus on a street <|__dj__eoc|>", "a red bus on a street"),
        ("<__dj__image> a red bus <|__dj__eoc|>\n", "a red bus"),
        ("<__dj__image>红色的公交车。<|__dj__eoc|>", "红色的公交车。"),
        ("a red bus\n<__dj__image> <|__dj__eoc|>", "a red bus"),
        ("<image>\na red bus", "a red bus"),
        ("a red bus", "a red bus"),
        ("<__dj__image>\nthe word <image> <|__dj__eoc|>", "the word <image>"),
        ("<__dj__image>\na bus <|__dj__eoc|>\n<__dj__image>\na red bus <|__dj__eoc|>", "a bus\na red bus"),
        ("<__dj__image>\n <|__dj__eoc|>", ""),
    ],
)
def test_a_caption_is_the_text_without_the_marks(text: str, caption: str) -> None:
    assert caption_in(text) == caption


def test_a_question_is_found_under_ids_as_numbers_and_as_text() -> None:
    record = {"id": "7", "text": "<__dj__image>\na cat <|__dj__eoc|>", "images": ["c.png"]}
    found = restored_record(record, {"7": Original(7, "<image>\nWhat is it?")})
    assert found == {
        "id": 7,
        "image": "c.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}],
    }
    assert restored_record({**record, "id": 7}, {"7": Original(7, "<image>\nWhat is it?")}) == found
    added = {**record, "id": "7-1", "original_id": "7"}  # a caption beside the record's own
    assert restored_record(added, {"7": Original(7, "<image>\nWhat is it?")}) == found


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"id": "8", "text": "x", "images": []}, "no question with its id in the LLaVA file"),
        ({"id": "9", "text": "x", "images": []}, "several questions with its id in the LLaVA file"),
        ({"text": "x", "images": []}, "no id"),
        ({"id": True, "text": "x", "images": []}, "no id"),
        ({"id": "7", "images": []}, "text is not a string"),
        ({"id": "7", "text": "x", "images": "a.png"}, "pictures are not a list of names"),
    ],
)
def test_a_caption_whose_question_cannot_be_found_is_refused(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecordError) as refused:
        restored_record(record, {"7": Original("7", "<image>\nWhat?"), "9": None})
    assert refused.value.reason == reason


def test_a_picture_that_a_second_caption_names_again_is_one() -> None:
    text = "<__dj__image>\na bus <|__dj__eoc|>\n<__dj__image>\na red bus <|__dj__eoc|>"
    record = {"id": "7", "text": text, "images": ["a.png", "a.png"]}
    assert restored_record(record, {"7": Original("7", "<image>\nWhat?")})["image"] == "a.png"


NO_TURN = "a turn lacks a `from` (system, human or gpt) or a text as `value`"


def turns(*values: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": value} for who, value in values]


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (None, "no conversations"),
        ([], "no conversations"),
        (["a"], NO_TURN),
        (
            turns(("user", "<image>\nx"), ("gpt", "y")),
            NO_TURN,
        ),
        ([{"from": "human", "value": 3}], NO_TURN),
        (turns(("human", "<image>\nx")), "turns are not pairs of human and gpt"),
        (turns(("gpt", "x"), ("human", "<image>\ny")), "turns are not pairs of human and gpt"),
        (turns(("system", "s")), "turns are not pairs of human and gpt"),
        (turns(("human", "<image>\nx"), ("gpt", " ")), "empty turn"),
        (turns(("human", "x"), ("gpt", "y")), "not one <image> for each picture"),
        (turns(("human", "<image><image>x"), ("gpt", "y")), "not one <image> for each picture"),
        (turns(("human", "x"), ("gpt", "y <image>")), "not one <image> for each picture"),
    ],
)
def test_an_unusable_conversation_is_refused(conversation: Any, reason: str) -> None:
    with pytest.raises(BadRecordError) as refused:
        to_messages({"id": 1, "image": "a.png", "conversations": conversation})
    assert refused.value.reason == reason


@pytest.mark.parametrize("mark", [DJ_PLACE, DJ_END, "[[gpt]]: ", "x\n[[human]]: y"])
def test_a_turn_that_data_juicers_form_cannot_express_is_refused(mark: str) -> None:
    record = {"id": 1, "conversations": turns(("human", "x"), ("gpt", f"a {mark} b"))}
    for write in (to_dj, to_dj_caption):
        with pytest.raises(BadRecordError) as refused:
            write(record)
        assert refused.value.reason == "a turn contains a Data-Juicer mark"


@pytest.mark.parametrize("value", ["[[human]]:", "a\n[[gpt]]:"])
def test_a_turn_that_ends_with_the_start_of_a_mark_is_refused(value: str) -> None:
    """With the blank before the end mark it would start another turn."""
    for write in (to_dj, to_dj_caption):
        with pytest.raises(BadRecordError) as refused:
            write({"id": 1, "conversations": turns(("human", "x"), ("gpt", value))})
        assert refused.value.reason == "a turn contains a Data-Juicer mark"


def test_the_caption_form_holds_only_one_question() -> None:
    with pytest.raises(BadRecordError, match="4 turns"):
        to_dj_caption(BUS)
    with pytest.raises(BadRecordError, match="a cat"):
        to_dj_caption({"id": 1, "conversations": turns(("human", "x"), ("gpt", "a cat <image>"))})


def test_what_is_null_or_empty_is_not_given_and_a_number_is_its_text() -> None:
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": 3}]
    for nothing in (None, "", [], [None], [""]):
        assert to_messages({"id": 1, "image": nothing, "conversations": turns}) == (
            [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}],
            [],
        )
        caption = {"id": "7", "text": "A bus.", "images": nothing, "original_id": None}
        restored = restored_record(caption, {"7": Original(7, "What is it?")})
        assert restored["id"] == 7 and "image" not in restored
