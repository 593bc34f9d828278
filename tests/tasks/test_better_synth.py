"""better_synth: its files and pictures, the prompts, the submission and the scores."""

import base64
import csv
import importlib.util
import io
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import openpyxl
import pytest
from PIL import Image

from stages.contract.errors import DataError, UsageError
from stages.contract.recipe import Recipe, load_recipe, profile_names
from stages.contract.records import Prediction, Sample
from stages.models.pictures import PictureRules, open_picture
from stages.preprocess.split import split_questions
from stages.tasks import settle_recipe
from stages.tasks.better_synth import (
    ask,
    asked_rows,
    build_samples,
    read_answer,
    read_others,
    read_records,
    records,
    score,
    sources,
    submission,
    together,
    uploads,
)
from stages.tasks.better_synth.records import AHEAD, PictureQuestion, without_ocr_words
from stages.tasks.common.json_lines import BadRecordError
from stages.tasks.common.pictures import MEAN_COLOUR, Pictures
from stages.tasks.task import Skip
from tests.conftest import REPOSITORY

Skipped = list[tuple[str, str, str]]
RECIPE = REPOSITORY / "recipes" / "better-synth.yaml"
DEMO = REPOSITORY / "recipes" / "data" / "better-synth"
ONE_WORD = "\nAnswer the question using a single word or phrase."


def recipe(*overrides: str, profile: str | None = "tiny") -> Recipe:
    return settle_recipe(load_recipe(RECIPE, profile, overrides), "better-synth", REPOSITORY / "recipes" / "data")


def png(colour: str = "red", size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, kind)
    return data.getvalue()


def talk(name: Any, image: Any, *turns: str) -> dict[str, Any]:
    speakers = ("human", "gpt") * len(turns)
    said = [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=False)]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": said}


CAPTION = {"id": "7", "text": "<__dj__image>\na red square <|__dj__eoc|>", "images": ["images/red.png"]}
ORIGINAL = talk(7, "images/red.png", "<image>\nWhat is it?", "a square")
TEXTVQA = {
    "question_id": "t1",
    "image": "images/test.png",
    "text": f"What does it say?\nReference OCR token: EXIT{ONE_WORD}",
}
ANNOTATION = {"image_id": "t1", "question": "What does it say?", "answers": ["exit"] * 8 + ["out"] * 2}
MMBENCH = {
    **{"index": 3, "question": "Which colour?", "hint": "", "A": "red", "B": "blue", "C": "green", "D": ""},
    **{"answer": "B", "category": "colour", "l2-category": "perception"},
}


def make(folder: Path, **files: Any) -> Path:
    """A data folder with a question of each kind; `files` replace its files, None leaves one out."""
    contents: dict[str, Any] = {
        **{"records": [CAPTION], "records_llava": [ORIGINAL], "textvqa": [TEXTVQA], "mmbench": [MMBENCH]},
        **{"finetune": [talk("a", "images/red.png", "<image>\nWhich colour?", "red")]},
        **{"textvqa_annotations": {"data": [ANNOTATION]}, **files},
    }
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for colour in ("red", "blue"):
        (folder / "images" / f"{colour}.png").write_bytes(png(colour))
    (folder / "images" / "test.png").write_bytes(png("black"))
    for name, rows in contents.items():
        if rows is None:
            continue
        if name == "mmbench":
            write_table(folder / "mmbench.tsv", rows)
        elif name in ("records", "textvqa"):
            lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
            (folder / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        else:
            (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys([*(name for row in rows for name in row), "image"]))
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, delimiter="\t")
        table.writeheader()
        table.writerows({"image": base64.b64encode(png("white")).decode(), **row} for row in rows)


def read_all(recipe: Recipe, folder: Path, kept: Path, pictures: Path, skip: Skip) -> list[PictureQuestion]:
    others = read_others(recipe, folder, pictures, skip)
    return others + read_records(recipe, folder, kept, pictures, others, skip)


def read(folder: Path, *overrides: str, kept: Path | None = None) -> tuple[dict[str, PictureQuestion], Skipped]:
    """The questions by their ids."""
    skipped: Skipped = []

    def skip(what: str, reason: str, detail: str = "") -> None:
        skipped.append((what, reason, detail))

    pictures = folder.parent / "run" / "preprocess" / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    found = read_all(recipe(*overrides), folder, kept or records(folder), pictures, skip)
    by_id = {question.id: question for question in found}
    assert len(by_id) == len(found), "ids are unique"
    return by_id, skipped


def sample_of(question: PictureQuestion, split: str = "test") -> Sample:
    (sample,) = build_samples(recipe(), question, None, split)
    return sample


def prediction(answer: str | None, text: str | None) -> Prediction:
    return {
        **{"id": "", "answer": answer, "text": text, "finish_reason": "stop", "prompt_tokens": 1},
        **{"completion_tokens": 1, "error": None if answer else "no answer", "passes": {}},
    }  # type: ignore[typeddict-item, return-value]


# -- training sets -----------------------------------------------------------------------------------------------


def test_a_caption_is_learnt_with_its_own_question(tmp_path: Path) -> None:
    questions, skipped = read(make(tmp_path / "data"))
    sample = sample_of(questions["pretrain/7"], "train")
    assert sample["messages"] == [{"role": "user", "content": "<image>\nWhat is it?"}]
    assert sample["references"] == ["a red square"]
    assert (tmp_path / "run" / sample["images"][0]).read_bytes() == png("red")
    assert skipped == []


def test_records_that_data_juicer_keeps_replace_the_file(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", records=[CAPTION, {**CAPTION, "id": "8"}])
    kept = tmp_path / "kept.jsonl"
    kept.write_text(json.dumps({**CAPTION, "text": "<__dj__image> a crimson square <|__dj__eoc|>"}) + "\n")
    questions, _ = read(folder, kept=kept)
    learnt = {name: question.answers for name, question in questions.items() if question.source == "pretrain"}
    assert learnt == {"pretrain/7": ("a crimson square",)}


def test_a_second_caption_of_a_record_is_a_sample_of_its_own(tmp_path: Path) -> None:
    other = {**CAPTION, "text": "<__dj__image>\na square in red <|__dj__eoc|>"}
    questions, skipped = read(make(tmp_path / "data", records=[CAPTION, other, CAPTION]))
    assert [questions[f"pretrain/{name}"].answers[0] for name in ("7", "7#2")] == ["a red square", "a square in red"]
    assert skipped == [("records.jsonl:3", "duplicate record", "7")]


def test_records_with_all_turns_need_no_original(tmp_path: Path) -> None:
    text = "[[human]]: <__dj__image>\n这是什么颜色？\n[[gpt]]: 红色。 <|__dj__eoc|>"
    questions, _ = read(make(tmp_path / "data", records=[{**CAPTION, "text": text}], records_llava=None))
    assert questions["pretrain/7"].messages[0]["content"] == "<image>\n这是什么颜色？"
    assert questions["pretrain/7"].answers == ("红色。",)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"id": "x", "te', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (["a"], "not a JSON object"),
        ({**CAPTION, "id": None}, "no id"),
        ({**CAPTION, "id": "999"}, "no question with its id in the LLaVA file"),
        ({**CAPTION, "text": 5}, "text is not a string"),
        ({**CAPTION, "text": "<__dj__image>\n <|__dj__eoc|>"}, "empty turn"),
        ({**CAPTION, "images": []}, "not one <image> for each picture"),
        ({**CAPTION, "images": ["images/none.png"]}, "picture cannot be read"),
        ({**CAPTION, "images": ["images/a\0b.png"]}, "picture cannot be read"),
        ({**CAPTION, "images": ["../data/images/red.png"]}, "picture outside the data folder"),
        ({**CAPTION, "images": ["/etc/hostname"]}, "picture outside the data folder"),
        ({**CAPTION, "images": ["records_llava.json"]}, "not a picture, or damaged"),
        ({**CAPTION, "images": ["images/test.png"]}, "shows a picture of a test set"),
    ],
)
def test_a_bad_record_is_skipped_with_its_line(tmp_path: Path, bad: Any, reason: str) -> None:
    questions, skipped = read(make(tmp_path / "data", records=[CAPTION, bad]))
    assert [(where, why) for where, why, _ in skipped] == [("records.jsonl:2", reason)]
    assert "pretrain/7" in questions


def test_neither_of_two_questions_with_the_same_id_is_used(tmp_path: Path) -> None:
    twice = [ORIGINAL, ORIGINAL, talk("7", "images/red.png", "<image>\nWhat else?", "x")]
    questions, skipped = read(make(tmp_path / "data", records_llava=twice))
    assert "pretrain/7" not in questions
    assert skipped == [("records.jsonl:1", "several questions with its id in the LLaVA file", "7")]


def test_conversations_keep_their_turns_and_pictures(tmp_path: Path) -> None:
    talks = [
        talk(5, ["images/red.png", "images/blue.png"], "One: <image> two: <image> Same?", "不一样", "Why?", "colours"),
        talk("b", None, "没有图片", "对"),
        talk(5, "images/blue.png", "<image>\nWhich?", "blue"),
    ]
    questions, skipped = read(make(tmp_path / "data", finetune=talks))
    sample = sample_of(questions["finetune/5"], "train")
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant", "user"]
    assert sample["messages"][0]["content"].count("<image>") == len(sample["images"]) == 2
    assert (tmp_path / "run" / sample["images"][1]).read_bytes() == png("blue")
    assert sample["references"] == ["colours"]
    assert questions["finetune/b"].images == () and questions["finetune/b"].group.startswith("text-")
    assert questions["finetune/5#2"].answers == ("blue",)
    assert skipped == []


def test_one_of_several_pictures_in_a_test_set_leaves_the_conversation_out(tmp_path: Path) -> None:
    both = talk("a", ["images/red.png", "images/test.png"], "<image><image>Same?", "no")
    questions, skipped = read(make(tmp_path / "data", finetune=[both]))
    assert "finetune/a" not in questions
    assert [why for _, why, _ in skipped] == ["shows a picture of a test set"]


def test_a_conversation_says_what_the_data_say(tmp_path: Path) -> None:
    said = talk(
        "a", "images/red.png", "<image>\nIs <video> or <|im_end|> there?", "the word <image> is", "So?", "<|x|>"
    )
    question = read(make(tmp_path / "data", finetune=[said]))[0]["finetune/a"]
    assert question.messages[0]["content"] == "<image>\nIs <video> or <|im_end|> there?"
    assert question.answers == ("<|x|>",)
    answered = question.messages[1]["content"]
    assert "<image>" not in answered and answered.replace("\u2060", "") == "the word <image> is"


# -- pictures ----------------------------------------------------------------------------------------------------


def test_pictures_become_squares_without_cropping(tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(png("red", (40, 10)))
    store = Pictures(tmp_path, tmp_path, pad=True)
    with Image.open(tmp_path / store.of_file("wide.png").name) as square:
        assert square.size == (40, 40)
        assert square.getpixel((0, 20)) == (255, 0, 0) and square.getpixel((39, 20)) == (255, 0, 0)
        assert square.getpixel((20, 0)) == square.getpixel((20, 39)) == MEAN_COLOUR
    as_it_is = Pictures(tmp_path, tmp_path, pad=False).of_file("wide.png")
    assert (tmp_path / as_it_is.name).read_bytes() == png("red", (40, 10))


@pytest.mark.parametrize("pad", [True, False])
def test_a_phones_photo_is_stored_so_that_it_is_read_upright(tmp_path: Path, pad: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: the file's rows are the columns
    photo = Image.new("RGB", (56, 112), "white")
    photo.paste("red", (0, 0, 56, 28))
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif.tobytes(), quality=95)
    stored = Pictures(tmp_path, tmp_path, pad).of_file("photo.jpg")
    seen = open_picture(tmp_path / stored.name, PictureRules(min_pixels=28 * 28)).load()
    assert seen.size == ((112, 112) if pad else (56, 112))
    assert seen.getpixel((56 if pad else 28, 9)) == pytest.approx((255, 0, 0), abs=12)
    assert seen.getpixel((56 if pad else 28, 100)) == pytest.approx((255, 255, 255), abs=12)


def test_a_padded_picture_is_white_where_it_is_transparent_and_16_bits_are_scaled(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((20, 40), 257 * 100, np.uint16)).save(tmp_path / "grey.png")
    store = Pictures(tmp_path, tmp_path, pad=True)
    for name, colour in (("clear.png", (255, 255, 255)), ("grey.png", (100, 100, 100))):
        with Image.open(tmp_path / store.of_file(name).name) as square:
            assert square.getpixel((20, 20)) == colour, name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("size", [(64, 64), (64, 32)])
def test_a_truncated_picture_is_refused_and_not_stored(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    noise = Image.effect_noise(size, 80).convert("RGB")
    data = io.BytesIO()
    noise.save(data, kind)
    whole = data.getvalue()
    store = Pictures(tmp_path, tmp_path, pad=True)
    with Image.open(tmp_path / store.of_bytes(whole, "whole").name) as kept:
        assert kept.size == (64, 64)
    (tmp_path / "broken").mkdir()
    with pytest.raises(BadRecordError):
        Pictures(tmp_path, tmp_path / "broken", pad=True).of_bytes(whole[: len(whole) * 2 // 3], "half")
    assert list((tmp_path / "broken").iterdir()) == []


def test_the_same_picture_is_stored_once(tmp_path: Path) -> None:
    data = make(tmp_path / "data", finetune=[talk(n, "images/red.png", f"<image>\n{n}?", "red") for n in range(5)])
    questions, _ = read(data)
    assert len({question.images for question in questions.values() if question.source == "finetune"}) == 1
    assert len(list((tmp_path / "run" / "preprocess" / "pictures").iterdir())) == 3  # red, black, white


def test_many_pictures_are_stored_in_parallel_and_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record with a damaged picture affects no other, in any batch."""
    count = AHEAD + 20
    talks = [talk(n, f"images/{n}.png", "<image>\nWhich?", "x") for n in range(count)]
    data = make(tmp_path / "data", finetune=talks)
    for n in range(count):
        (data / "images" / f"{n}.png").write_bytes(png(f"#{n:06x}", (6, 4)) if n % 100 else b"none")
    questions, skipped = read(data)
    broken = [f"images/{n}.png" for n in range(0, count, 100)]
    assert [detail.split()[0] for _, _, detail in skipped] == broken and AHEAD > 500
    learnt = {name: question.images for name, question in questions.items() if question.source == "finetune"}
    assert len(learnt) == len(set(learnt.values())) == count - len(broken)
    folder = tmp_path / "run" / "preprocess" / "pictures"
    with Image.open(folder / questions["finetune/7"].images[0]) as seven:
        assert seven.getpixel((3, 3)) == (0, 0, 7)

    def padded_file(picture: Any) -> bytes:
        raise AssertionError("an existing picture is written again")

    monkeypatch.setattr("stages.tasks.common.pictures._padded_file", padded_file)
    again, _ = read(data)
    assert {name: question.images for name, question in again.items()} == {
        name: question.images for name, question in questions.items()
    }


# -- test sets ---------------------------------------------------------------------------------------------------


def test_textvqa_is_asked_as_published_and_scored_by_ten_humans(tmp_path: Path) -> None:
    questions, _ = read(make(tmp_path / "data"))
    sample = sample_of(questions["textvqa/t1/1"])
    assert sample["messages"] == [{"role": "user", "content": f"<image>\n{TEXTVQA['text']}"}]
    assert len(sample["references"]) == 10
    answers = {"Exit.": 1.0, "out": 0.6, "door": 0.0}
    for said, value in answers.items():
        assert score(recipe(), str(read_answer(f" {said}\n", sample)), sample) == {"textvqa_accuracy": value}
    assert read_answer(" \n", sample) is None


def test_textvqa_without_ocr_words(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    plain = read(folder, "preprocess.samples.ocr=false")[0]["textvqa/t1/1"]
    assert plain.text == f"<image>\nWhat does it say?{ONE_WORD}"
    sample = sample_of(read(folder)[0]["textvqa/t1/1"])
    assert ask(recipe(), sample, "answer", {}, ("ocr",)).messages == list(plain.messages)


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("What?\nReference OCR token: A, B\nAnswer.", "What?\nAnswer."),
        ("Reference OCR token: A, B\nWhat?\nAnswer.", "What?\nAnswer."),
        ("What?\nAnswer.", "What?\nAnswer."),
        ("OCR tokens: A, B. Question: What? Short answer:", "Question: What? Short answer:"),
        ("<image>\nOCR tokens: A\nB. Question: What? Short answer:", "<image>\nQuestion: What? Short answer:"),
    ],
)
def test_ocr_words_are_removed_from_either_form(prompt: str, plain: str) -> None:
    assert without_ocr_words(prompt) == plain


def test_textvqa_without_annotations_is_not_scored(tmp_path: Path) -> None:
    question = read(make(tmp_path / "data", textvqa_annotations=None))[0]["textvqa/t1/1"]
    assert (question.split, question.answers) == ("asked", ())


def test_textvqas_pictures_may_be_in_a_folder_of_their_own(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", textvqa=[{**TEXTVQA, "image": "test.png"}])
    assert read(folder)[0]["textvqa/t1/1"].error is not None
    assert read(folder, "preprocess.samples.textvqa_images=images")[0]["textvqa/t1/1"].error is None


def test_two_questions_on_a_picture_have_ids_of_their_own(tmp_path: Path) -> None:
    second = {**TEXTVQA, "text": f"What colour?{ONE_WORD}"}
    also = {**ANNOTATION, "question": "What colour?", "answers": ["black"] * 10}
    questions, _ = read(
        make(tmp_path / "data", textvqa=[TEXTVQA, second], textvqa_annotations={"data": [ANNOTATION, also]})
    )
    assert questions["textvqa/t1/2"].answers == ("black",) * 10


def test_mmbench_is_asked_in_every_rotation_and_counts_once(tmp_path: Path) -> None:
    questions, _ = read(make(tmp_path / "data"))
    samples = [sample_of(questions[f"mmbench/{name}"]) for name in ("3", "3#1", "3#2")]
    assert [sample["references"] for sample in samples] == [["B"], ["A"], ["C"]]
    first = samples[0]["messages"][0]["content"]
    assert first == (
        "<image>\nWhich colour?\nA. red\nB. blue\nC. green\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert {together(sample) for sample in samples} == {"mmbench/3"}
    assert [score(recipe(), "B", sample)["mmbench_accuracy"] for sample in samples] == [1.0, 0.0, 0.0]
    assert [read_answer("(B) blue", sample) for sample in samples] == ["B", "B", "B"]
    assert read_answer("I cannot tell", samples[0]) is None, "there is no default letter"
    assert {sample["meta"]["kind"] for sample in samples} == {"mmbench: colour"}


def test_mmbench_without_circular_evaluation_is_asked_once(tmp_path: Path) -> None:
    questions, _ = read(make(tmp_path / "data"), "preprocess.samples.circular=false")
    assert [name for name in questions if name.startswith("mmbench/")] == ["mmbench/3"]
    assert together(sample_of(questions["mmbench/3"])) == "mmbench/3"


def test_rotations_in_the_table_are_not_rotated_again(tmp_path: Path) -> None:
    """The second and third row name the first row's picture by its index; question 4 lacks a rotation."""
    turned = [
        MMBENCH,
        {**MMBENCH, "index": 1_000_003, "A": "blue", "B": "green", "C": "red", "answer": "A", "image": "3"},
        {**MMBENCH, "index": 2_000_003, "A": "green", "B": "red", "C": "blue", "answer": "C", "image": "3"},
        {**MMBENCH, "index": 4},
    ]
    questions, skipped = read(make(tmp_path / "data", mmbench=turned))
    found = [question for name, question in questions.items() if name.startswith("mmbench/")]
    assert [question.id for question in found] == ["mmbench/3", "mmbench/1000003", "mmbench/2000003"]
    assert len({question.images for question in found}) == 1
    assert {together(sample_of(question)) for question in found} == {"mmbench/3"}
    assert [(what, why) for what, why, _ in skipped] == [("mmbench/4", "rotations are missing")]


def test_mmbench_without_answers_is_asked_once_and_not_scored(tmp_path: Path) -> None:
    questions, _ = read(make(tmp_path / "data", mmbench=[{**MMBENCH, "answer": ""}]))
    asked = [question for name, question in questions.items() if name.startswith("mmbench/")]
    assert [(question.id, question.split, question.answers) for question in asked] == [("mmbench/3", "asked", ())]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"records_llava": None}, "records_llava.json: no such file, but records.jsonl:1 has only a caption; put"),
        (
            {"textvqa": None, "mmbench": None},
            "no question to test on, found .*; put textvqa.jsonl or mmbench.tsv there",
        ),
    ],
)
def test_missing_files_are_reported_before_data_juicer_starts(
    tmp_path: Path, missing: dict[str, None], message: str
) -> None:
    folder = make(tmp_path / "data", **missing)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match=message):
        records(folder)
        read_others(recipe(), folder, tmp_path / "pictures", lambda *_: None)


def test_textvqas_annotations_are_found_by_question_and_blanks(tmp_path: Path) -> None:
    asked = {**TEXTVQA, "text": f" what is it?{ONE_WORD}"}
    answers = {**ANNOTATION, "question": " what is it?"}
    questions, skipped = read(make(tmp_path / "data", textvqa=[asked], textvqa_annotations={"data": [answers]}))
    assert questions["textvqa/t1/1"].answers and not skipped


def test_a_test_question_without_its_picture_counts_as_failed(tmp_path: Path) -> None:
    lost = {**TEXTVQA, "image": "images/none.png"}
    broken = {**MMBENCH, "image": base64.b64encode(png()[:40] * 2).decode()}
    questions, skipped = read(make(tmp_path / "data", textvqa=[lost], mmbench=[broken]))
    assert "picture cannot be read: images/none.png" in sample_of(questions["textvqa/t1/1"])["meta"]["error"]
    assert "not a picture, or damaged: mmbench.tsv:2" in sample_of(questions["mmbench/3#2"])["meta"]["error"]
    assert skipped == []


def test_no_picture_and_no_question_of_a_test_set_is_trained_on(tmp_path: Path) -> None:
    """Also not the pictures of questions without answers."""
    shown = [
        talk("a", "images/test.png", "<image>\nWhich?", "x"),
        talk("b", "images/red.png", "<image>\nWhich?", "red"),
    ]
    questions, skipped = read(make(tmp_path / "data", finetune=shown, textvqa_annotations=None))
    assert [(where, why) for where, why, _ in skipped] == [("finetune.json:1", "shows a picture of a test set")]
    groups = {name: question.group for name, question in questions.items()}
    splits = split_questions(list(questions.values()), groups, recipe().data, 1, lambda *words: None)
    assert {name.partition("/")[0]: split for name, split in splits.items()} == {
        **{"pretrain": "train", "finetune": "train", "textvqa": "test", "mmbench": "test"}
    }


def test_without_its_picture_a_question_is_only_text(tmp_path: Path) -> None:
    sample = sample_of(read(make(tmp_path / "data"))[0]["mmbench/3"])
    asked = ask(recipe(), sample, "answer", {}, ("picture",))
    assert asked.images == [] and asked.messages[0]["content"].startswith("Which colour?")
    assert ask(recipe(), sample, "answer", {}, ()).images == sample["images"]


# -- submission --------------------------------------------------------------------------------------------------


def test_every_test_sample_is_in_one_row_and_the_lines_are_llavas(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", mmbench=[MMBENCH, {**MMBENCH, "index": 9, "C": "", "answer": "A"}])
    tested = [question for question in read(folder)[0].values() if question.split in ("test only", "asked")]
    rows = asked_rows(folder, tested)
    assert sorted(name for row in rows for name in row["ids"]) == sorted(question.id for question in tested)
    lines = [
        submission(row, {"textvqa/t1/1": prediction("exit", " exit\n"), "mmbench/9": prediction("B", "B.")})
        for row in rows
    ]
    assert lines[0] == {
        **{"question_id": "t1", "prompt": TEXTVQA["text"], "text": "exit"},
        **{"answer_id": "textvqa/t1/1", "model_id": "lorry", "metadata": {}},
    }
    assert [(line["question_id"], line["text"]) for line in lines[1:]] == [(3, ""), (9, "B.")]
    assert (
        lines[2]["round_id"] == 0 and lines[2]["options"] == ["red", "blue"] and lines[2]["option_char"] == ["A", "B"]
    )


def test_mmbenchs_upload_has_a_row_for_each_row_of_its_table(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", mmbench=[MMBENCH, {**MMBENCH, "index": 9}])
    samples = [sample_of(question) for question in read(folder)[0].values()]
    found = {
        "mmbench/3": prediction("B", "B"),
        "mmbench/3#1": prediction("C", "C"),
        "mmbench/9": prediction(None, "?!"),
    }
    assert uploads(tmp_path, samples, found) == ["mmbench.xlsx"]
    head, *rows = openpyxl.load_workbook(tmp_path / "mmbench.xlsx").active.iter_rows(values_only=True)
    found_there = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(row["index"], row["prediction"]) for row in found_there] == [(3, "B"), (9, "?!")]
    assert found_there[0]["question"] == "Which colour?" and not {"category", "image", "hint"} & set(head)
    assert uploads(tmp_path, [sample for sample in samples if sample["meta"]["source"] != "mmbench"], found) == []


# -- files -------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nothing to train on, found nothing; put records\.jsonl or finetune\.json there"
    ):
        sources(tmp_path)
    with pytest.raises(DataError, match=r"records\.jsonl: no such file"):
        records(tmp_path)
    with pytest.raises(DataError, match="no question to test on"):
        read(make(tmp_path / "one", textvqa=None, mmbench=None))
    why = r"1 of 1 skipped: no question_id, first textvqa\.jsonl:1 \(found the keys image, question\)"
    with pytest.raises(DataError, match=f"no usable question to test on in textvqa.jsonl or mmbench.tsv; {why}"):
        read(make(tmp_path / "other", textvqa=[{"image": "x.png", "question": "q?"}], mmbench=None))
    with pytest.raises(
        DataError, match=r"records_llava\.json: no such file, but records\.jsonl:1 has only a caption; put"
    ):
        read(make(tmp_path / "two", records_llava=None))
    assert sources(make(tmp_path / "three", records=None)) == ["finetune"]


def test_data_juicer_is_for_tasks_that_read_records(tmp_path: Path) -> None:
    juicer = "preprocess.data_juicer={process: [{text_length_filter: {min_len: 3}}]}"
    other = load_recipe(REPOSITORY / "recipes" / "logic-choice.yaml", "tiny", (juicer,))
    with pytest.raises(UsageError, match="reads no records"):
        settle_recipe(other, "logic-choice", REPOSITORY / "recipes" / "data")


# -- the demo ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    found = importlib.util.spec_from_file_location("make_better_synth", DEMO.parent / "make_better_synth.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    import sys

    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def test_the_demo_is_read_in_full_except_for_eight_captions(tmp_path: Path) -> None:
    skipped: Skipped = []
    found = read_all(recipe(), DEMO, records(DEMO), tmp_path, lambda *words: skipped.append(words))  # type: ignore[arg-type]
    counts = Counter(question.source for question in found)
    assert counts == {"pretrain": 152, "finetune": 160, "textvqa": 24, "mmbench": 56}
    assert {reason for _, reason, _ in skipped} == {"no question with its id in the LLaVA file"} and len(skipped) == 8
    assert not any(question.error for question in found)
    assert any(len(question.images) == 2 for question in found)
    assert any(len(question.messages) == 5 for question in found)
    assert any("图" in question.text for question in found)


def test_the_demo_is_reproducible_by_its_seed(tmp_path: Path, maker: ModuleType) -> None:
    """The pictures are not compared: their bytes depend on Pillow's version."""
    options = {"records": 160, "finetune": 160, "textvqa": 24, "mmbench": 16, "size": 64}
    maker.make(tmp_path / "again", 2, **options)
    for name in ("records.jsonl", "records_llava.json", "finetune.json", "textvqa.jsonl", "textvqa_annotations.json"):
        assert (tmp_path / "again" / name).read_bytes() == (DEMO / name).read_bytes(), name
    maker.make(tmp_path / "other", 3, **options)
    assert (tmp_path / "other" / "records.jsonl").read_bytes() != (DEMO / "records.jsonl").read_bytes()


@pytest.mark.parametrize("profile", [None, *profile_names(RECIPE)])
def test_the_rules_of_the_challenge_are_in_every_profile_of_the_real_model(profile: str | None) -> None:
    train = recipe(profile=profile).train
    assert train.connector is not None
    assert [part.source for part in train.connector.data] == ["pretrain"]
    assert [[part.source for part in adapter.data] for adapter in train.adapters] == [["finetune"]]
    if profile != "tiny":
        assert (train.connector.effective_batch, train.effective_batch) == (256, 128)
        assert train.connector.most_samples == 200_000
