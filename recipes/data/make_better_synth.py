"""Write the data of the recipe better-synth: pictures of coloured shapes and printed words, with captions,
conversations and questions.

A picture has one to four shapes, some of them alike, and sometimes a word on a sign. The folder has:

    records.jsonl             Data-Juicer records: a picture and its caption; some are noise, some near duplicates
    records_llava.json        the same in LLaVA's form, with the questions that the records lack
    finetune.json             conversations on the same pictures: several turns, some in Chinese, some on two pictures
    textvqa.jsonl             questions on words in other pictures, with the words that OCR finds
    textvqa_annotations.json  ten human answers to each
    mmbench.tsv               single-choice questions with two to four options, each with its picture in base64
    words/flagged_words.json  words that no caption should have, in Data-Juicer's form
    images/                   the pictures

Of 20 records, three are noise (too short, full of special characters, or advertising), two nearly repeat the one
before, and one has no question. The captions of the others are true. The same arguments and the same version of Pillow
give the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent / "better-synth"
COLOURS = {"red": "红色", "blue": "蓝色", "green": "绿色", "yellow": "黄色", "black": "黑色", "purple": "紫色"}
SHAPES = {"circle": "圆", "square": "正方形", "triangle": "三角形"}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
CHINESE_NUMBERS = {0: "零", 1: "一", 2: "两", 3: "三", 4: "四"}
WORDS = (
    *("OPEN", "EXIT", "STOP", "TAXI", "HOTEL", "BAKERY", "MUSEUM", "BANK", "PARK", "CAFE", "LIBRARY", "MARKET"),
    *("GARAGE", "CINEMA", "SCHOOL", "STATION", "BRIDGE", "HARBOUR", "PHARMACY", "THEATRE"),
)
PLACES = ("on a wall", "in a row", "on a table", "on a poster", "next to each other", "in a drawing")
ASK_TO_DESCRIBE = (
    "<image>\nDescribe the picture briefly.",
    "<image>\nWhat is in the photo?",
    "Give a short description of the picture.\n<image>",
    "<image>\n简单描述这张图片。",
)
FLAGGED = {"en": ["click", "buy"], "zh": ["点击", "购买"]}
ONE_WORD = "\nAnswer the question using a single word or phrase."
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image")


@dataclass(frozen=True)
class Scene:
    """The content of a picture."""

    shapes: tuple[tuple[str, str], ...]
    """Colour and kind of each shape, from left to right."""
    word: str | None
    size: tuple[int, int]
    """Width and height in pixels."""

    def count(self, kind: str) -> int:
        return sum(shape == kind for _, shape in self.shapes)

    def draw(self) -> bytes:
        """The picture as PNG."""
        width, height = self.size
        picture = Image.new("RGB", self.size, "white")
        pen = ImageDraw.Draw(picture)
        band = height if self.word is None else height * 2 // 3
        side = min(width // len(self.shapes), band) * 3 // 4
        for place, (colour, kind) in enumerate(self.shapes):
            left = (2 * place + 1) * width // (2 * len(self.shapes)) - side // 2
            top = (band - side) // 2
            box = (left, top, left + side, top + side)
            if kind == "circle":
                pen.ellipse(box, fill=colour)
            elif kind == "square":
                pen.rectangle(box, fill=colour)
            else:
                pen.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], fill=colour)
        if self.word is not None:
            pen.rectangle((0, band, width - 1, height - 1), fill="lightgray")
            font = ImageFont.load_default(size=min((height - band) * 0.7, 1.4 * width / len(self.word)))
            pen.text((width / 2, (band + height) / 2), self.word, fill="black", font=font, anchor="mm")
        data = io.BytesIO()
        picture.quantize(16).save(data, "PNG", optimize=True)
        return data.getvalue()

    def caption(self, rng: random.Random, chinese: bool = False) -> str:
        """The full description of the picture."""
        kinds = list(dict.fromkeys(self.shapes))
        counted = [(self.shapes.count(one), *one) for one in kinds]
        if chinese:
            listing = "、".join(
                f"{CHINESE_NUMBERS[n]}个{COLOURS[colour]}的{SHAPES[kind]}" for n, colour, kind in counted
            )
            sign = f"，下面写着“{self.word}”" if self.word else ""
            return f"白色背景上有{listing}{sign}。"
        parts = [f"{NUMBERS[n]} {colour} {kind}{'s' if n > 1 else ''}" for n, colour, kind in counted]
        listing = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        sign = f" above a sign that says {self.word}" if self.word else ""
        return f"{listing} {rng.choice(PLACES)}{sign}"


def make_scene(rng: random.Random, size: int, word: bool) -> Scene:
    """A random scene of about `size` pixels per side; wide, high or square."""
    kinds = [(rng.choice(list(COLOURS)), rng.choice(list(SHAPES))) for _ in range(rng.choice((1, 2, 2, 3)))]
    shapes = [*kinds, rng.choice(kinds)] if rng.random() < 0.4 else kinds
    sides = rng.choice(((size, size), (size * 3 // 2, size), (size, size * 5 // 4)))
    return Scene(tuple(shapes), rng.choice(WORDS) if word else None, sides)


# -- records and conversations -----------------------------------------------------------------------------------


def record(scene: Scene, name: str, number: int, rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Data-Juicer record, and the same in LLaVA's form; some ids of the latter are numbers."""
    caption = scene.caption(rng, chinese=number % 10 == 7)
    if number % 20 == 4:
        caption = "img"
    elif number % 20 == 14:
        caption = "".join(rng.choice("#$%&*@^~|+=") for _ in range(40))
    elif number % 20 == 16:
        caption = f"click here to buy {caption}"
    question = rng.choice(ASK_TO_DESCRIBE[:-1]) if number % 10 != 7 else ASK_TO_DESCRIBE[-1]
    image = f"images/{name}.png"
    plain = {"id": name, "text": f"<__dj__image>\n{caption} <|__dj__eoc|>", "images": [image]}
    return plain, llava(int(name) if number % 4 else name, [image], [(question, caption)])


def llava(name: str | int, images: list[str], turns: list[tuple[str, str]]) -> dict[str, Any]:
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": name, "image": images[0] if len(images) == 1 else images, "conversations": said}


def conversation(scene: Scene, rng: random.Random, chinese: bool) -> list[tuple[str, str]]:
    """Questions on one picture and their answers; the first question has the picture."""
    kind, (colour, shape) = rng.choice(list(SHAPES)), scene.shapes[0]
    if chinese:
        turns = [
            (f"图中有几个{SHAPES[kind]}？", f"{CHINESE_NUMBERS[scene.count(kind)]}个"),
            ("最左边的图形是什么颜色？", COLOURS[colour]),
            ("最左边的图形是什么？", SHAPES[shape]),
        ]
        end = "\n请用一个词回答。"
    else:
        turns = [
            (f"How many {kind}s are there?", str(scene.count(kind))),
            (f"What colour is the {shape} on the left?", colour),
            ("Which shape is on the left?", shape),
        ]
        end = ONE_WORD
    if scene.word:
        turns.append(("下面写着什么？" if chinese else "What does the sign say?", scene.word))
    asked = rng.sample(turns, rng.choice((1, 2, 3)))
    first, *others = [(question + end, answer) for question, answer in asked]
    return [(f"<image>\n{first[0]}", first[1]), *others]


def make_records(
    folder: Path, seed: int, count: int, size: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Scene]]:
    """The records, the same in LLaVA's form, and the scenes by their pictures."""
    records, originals, scenes = [], [], {}
    for number in range(count):
        rng, name = random.Random(f"{seed}-record-{number}"), str(100_000_000 + number)
        scene = make_scene(rng, size, word=number % 3 == 0)
        plain, original = record(scene, name, number, rng)
        if number % 20 in (9, 19):  # a near duplicate of the one before: the same picture, one more word
            before = records[-1]
            plain = {**before, "id": name, "text": before["text"].replace(" <|", " again <|")}
            original = {**originals[-1], "id": name}
        else:
            scenes[plain["images"][0]] = scene
            write_picture(folder / plain["images"][0], scene)
        records.append(plain)
        originals.append(original)
    lost = [one for number, one in enumerate(originals) if number % 20 == 12]
    return records, [one for one in originals if one not in lost], scenes


def make_finetune(seed: int, count: int, scenes: dict[str, Scene]) -> Iterator[dict[str, Any]]:
    """Conversations on the pictures of the records."""
    names = list(scenes)
    for number in range(count):
        rng, image = random.Random(f"{seed}-finetune-{number}"), names[number % len(names)]
        turns = conversation(scenes[image], rng, chinese=number % 8 == 3)
        if number % 10 != 6:
            yield llava(f"talk-{number:05}", [image], turns)
            continue
        other = names[(number + 1) % len(names)]
        more = "first" if len(scenes[image].shapes) >= len(scenes[other].shapes) else "second"
        asked = f"Here is one picture: <image> and another: <image> Which has more shapes?{ONE_WORD}"
        yield llava(f"talk-{number:05}", [image, other], [(asked, more)])


# -- test sets ---------------------------------------------------------------------------------------------------


def make_textvqa(folder: Path, seed: int, count: int, size: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions and annotations. The picture's name is the question's id, which two questions share."""
    questions, annotations = [], []
    for number in range(count):
        rng = random.Random(f"{seed}-textvqa-{number // 2}")
        scene, name = make_scene(rng, size, word=True), f"{number // 2:016x}"
        write_picture(folder / f"images/textvqa/{name}.png", scene)
        assert scene.word is not None
        colour, shape = scene.shapes[0]
        question, answer = (
            ("What is written on the sign?", scene.word.lower()),
            (f"What color is the {shape} on the left?", colour),
        )[number % 2]
        rng = random.Random(f"{seed}-answers-{number}")
        other = rng.choice([f"the {answer}", f"{answer}.", "unanswerable", answer[:-1]])
        answers = [answer] * 7 + [other] * 2 + [rng.choice(list(COLOURS))]
        rng.shuffle(answers)
        text = f"{question}\nReference OCR token: {scene.word}{ONE_WORD}"
        questions.append({"question_id": name, "image": f"images/textvqa/{name}.png", "text": text})
        annotations.append({"image_id": name, "question_id": number, "question": question, "answers": answers})
    return questions, annotations


def make_mmbench(seed: int, count: int, size: int) -> Iterator[dict[str, Any]]:
    """Rows of the table: in turn a count, a colour, the word on the sign, and yes or no."""
    for number in range(count):
        rng = random.Random(f"{seed}-mmbench-{number}")
        scene = make_scene(rng, size, word=True)
        assert scene.word is not None
        colour, shape = scene.shapes[0]
        there = rng.choice([shape, rng.choice(list(SHAPES))])
        question, answer, others, category = (
            ("How many shapes are there?", str(len(scene.shapes)), list("1234"), "counting"),
            (f"Which colour has the {shape} on the left?", colour, list(COLOURS), "colour"),
            ("What does the sign say?", scene.word, list(WORDS), "text"),
            (f"Is there a {there}?", "Yes" if scene.count(there) else "No", ["Yes", "No"], "presence"),
        )[number % 4]
        wrong = [other for other in others if other != answer]
        options = [answer, *rng.sample(wrong, min(3, len(wrong)))]
        rng.shuffle(options)
        yield {
            "index": 100 + number,
            "question": question,
            "hint": "Look at the gray part." if category == "text" and rng.random() < 0.5 else "",
            **dict(zip("ABCD", [*options, "", ""], strict=False)),
            "answer": "ABCD"[options.index(answer)],
            "category": category,
            "l2-category": "reading" if category == "text" else "perception",
            "image": base64.b64encode(scene.draw()).decode(),
        }


# -- files -------------------------------------------------------------------------------------------------------


def write_picture(path: Path, scene: Scene) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(scene.draw())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def make(folder: Path, seed: int, records: int, finetune: int, textvqa: int, mmbench: int, size: int) -> None:
    """Write a data folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plain, originals, scenes = make_records(folder, seed, records, size)
    write_lines(folder / "records.jsonl", plain)
    write_json(folder / "records_llava.json", originals)
    write_json(folder / "finetune.json", list(make_finetune(seed, finetune, scenes)))
    (folder / "words").mkdir(exist_ok=True)
    write_json(folder / "words" / "flagged_words.json", FLAGGED)
    questions, annotations = make_textvqa(folder, seed, textvqa, size)
    write_lines(folder / "textvqa.jsonl", questions)
    write_json(folder / "textvqa_annotations.json", {"data": annotations})
    with (folder / "mmbench.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(make_mmbench(seed, mmbench, size))


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--records", type=int, default=160, help="pictures with captions")
    parser.add_argument("--finetune", type=int, default=160, help="conversations")
    parser.add_argument("--textvqa", type=int, default=24, help="questions, two on each picture")
    parser.add_argument("--mmbench", type=int, default=16, help="single-choice questions")
    parser.add_argument("--size", type=int, default=64, help="approximate pixels of a picture's side")
    chosen = parser.parse_args()
    make(
        chosen.output,
        chosen.seed,
        chosen.records,
        chosen.finetune,
        chosen.textvqa,
        chosen.mmbench,
        chosen.size,
    )


if __name__ == "__main__":
    main()
