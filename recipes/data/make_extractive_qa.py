"""Write the invented data sets of extractive-qa, in every form that they can have.

Each context gives the same few facts about three things. A question asks for one fact about one of them, and the
context has the answer word for word. Two runs write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent / "extractive-qa"
SEED = 11
CONTEXTS = 40
QUESTIONS = 2

Record = dict[str, Any]

FIRST = [
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Karin",
    "Leon",
    "Marta",
    "Nils",
    "Olga",
    "Pedro",
    "Rosa",
    "Simon",
]
LAST = [
    "Holm",
    "Berger",
    "Castro",
    "Dahl",
    "Engel",
    "Fabre",
    "Grau",
    "Hansen",
    "Ivanov",
    "Janssen",
    "Keller",
    "Lund",
    "Moreau",
    "Novak",
    "Olsen",
    "Peters",
]
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "grey", "brown", "orange", "purple"]
BOATS = [
    "Tern",
    "Puffin",
    "Heron",
    "Curlew",
    "Gannet",
    "Petrel",
    "Plover",
    "Osprey",
    "Avocet",
    "Dunlin",
    "Skua",
    "Teal",
]
PLACES = [
    "Skerra",
    "Brandvik",
    "Lomsey",
    "Tarnholm",
    "Eskmouth",
    "Fallow",
    "Garve",
    "Hethwick",
    "Inverlay",
    "Kelstone",
    "Morrow",
    "Ulby",
]
OBJECTS = [
    "clock",
    "vase",
    "chest",
    "lamp",
    "mirror",
    "globe",
    "violin",
    "carpet",
    "helmet",
    "teapot",
    "sundial",
    "tapestry",
]
YEARS = range(1610, 1890)
ROOMS = ("the east wing", "the tower room", "the long gallery", "the blue hall", "the map room", "the lower vault")
GOODS = [
    "copper wire",
    "oak boards",
    "glass jars",
    "roof tiles",
    "wool yarn",
    "steel bolts",
    "paper rolls",
    "clay pots",
    "lamp oil",
]
FIRMS = [
    "Arden Works",
    "Bellow & Sons",
    "Corin Mills",
    "Dunmore Trading",
    "Elgar Supply",
    "Fenwick Brothers",
    "Garland Stores",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
SKIES = ("light rain", "thick fog", "heavy snow", "clear skies", "strong wind", "scattered showers", "a thunderstorm")
ZH_BOATS = ["海燕号", "飞鱼号", "白鹭号", "远航号", "平安号", "长风号", "星河号", "丰收号"]
ZH_PEOPLE = ["王明", "李娜", "张伟", "刘洋", "陈静", "赵磊", "孙丽", "周强", "吴敏", "郑浩", "何芳", "许峰"]
ZH_PLACES = ["青石港", "白沙湾", "望海镇", "东林渡", "金鸡码头", "南屏港", "月牙湾", "松口镇"]
ZH_GOODS = ["茶叶", "瓷器", "棉布", "铁矿石", "大米", "木材", "食盐", "药材"]


@dataclass(frozen=True)
class Kind:
    """Templates of a data set's contexts and questions."""

    opening: str
    """First sentence, with `{place}`."""
    places: list[str]
    things: list[str]
    tells: str
    """Sentence on a thing, with `{thing}` and the names of facts."""
    facts: dict[str, tuple[str, ...]]
    """The possible values of each fact, by its name."""
    asks: dict[str, str]
    """The question for each fact, by its name, with `{thing}`."""
    between: str = " "


def people(rng: random.Random) -> tuple[str, ...]:
    return tuple(sorted({f"{rng.choice(FIRST)} {rng.choice(LAST)}" for _ in range(80)}))


def kinds(rng: random.Random) -> dict[str, Kind]:
    names = people(rng)
    return {
        "harbour": Kind(
            "Three boats lie in the harbour of {place}.",
            PLACES,
            [f"the {boat}" for boat in BOATS],
            "{Thing} belongs to {owner}, is painted {colour} and was built in {year}.",
            {"owner": names, "colour": tuple(COLOURS), "year": tuple(map(str, YEARS))},
            {"owner": "Who owns {thing}?", "colour": "What colour is {thing}?", "year": "When was {thing} built?"},
        ),
        "museum": Kind(
            "The museum of {place} shows three treasures.",
            PLACES,
            [f"the {thing}" for thing in OBJECTS],
            "{Thing} was made by {maker} in {year} and stands in {room}.",
            {"maker": names, "year": tuple(map(str, YEARS)), "room": ROOMS},
            {
                "maker": "Who made {thing}?",
                "year": "In which year was {thing} made?",
                "room": "Where does {thing} stand?",
            },
        ),
        "orders": Kind(
            "Three orders were booked for the store in {place}.",
            PLACES,
            [f"order {number}" for number in range(101, 160)],
            "{Thing} is for {goods}, comes from {firm} and arrives on {day}.",
            {"goods": tuple(GOODS), "firm": tuple(FIRMS), "day": tuple(DAYS)},
            {
                "goods": "What is {thing} for?",
                "firm": "Which firm does {thing} come from?",
                "day": "On which day does {thing} arrive?",
            },
        ),
        "weather": Kind(
            "The weather book of {place} has three entries.",
            PLACES,
            [f"on {day}" for day in DAYS],
            "{Thing} {person} saw {sky} and counted {number} ships.",
            {"person": names, "sky": SKIES, "number": tuple(str(number) for number in range(11, 99))},
            {
                "person": "Who kept watch {thing}?",
                "sky": "What was the weather like {thing}?",
                "number": "How many ships were counted {thing}?",
            },
        ),
        "harbour-zh": Kind(
            "{place}停着三条船。",
            ZH_PLACES,
            ZH_BOATS,
            "{Thing}的船长是{captain}，装的是{goods}，{year}年下水。",
            {"captain": tuple(ZH_PEOPLE), "goods": tuple(ZH_GOODS), "year": tuple(map(str, YEARS))},
            {"captain": "{thing}的船长是谁？", "goods": "{thing}装的是什么？", "year": "{thing}是哪一年下水的？"},
            between="",
        ),
    }


def make_records(name: str, kind: Kind) -> list[Record]:
    """The questions of a data set in SQuAD's form; the title is the place, if no other context has the same."""
    rng = random.Random(f"{SEED}-{name}")
    records = []
    for number in range(CONTEXTS):
        things = rng.sample(kind.things, 3)
        drawn = {fact: rng.sample(values, 3) for fact, values in kind.facts.items()}
        sentences = [kind.opening.format(place=rng.choice(kind.places))]
        for row, thing in enumerate(things):
            values = {fact: drawn[fact][row] for fact in kind.facts}
            sentences.append(kind.tells.format(Thing=thing[0].upper() + thing[1:], **values))
        context = kind.between.join(sentences)
        asked = rng.sample([(row, fact) for row in range(3) for fact in kind.facts], QUESTIONS)
        for index, (row, fact) in enumerate(asked):
            answer = drawn[fact][row]
            records.append({
                "id": f"{number}-{index}",
                "context": context,
                "question": kind.asks[fact].format(thing=things[row]),
                "answers": {"text": [answer], "answer_start": [context.index(answer)]},
            })  # fmt: skip
    return records


def as_messages(record: Record) -> Record:
    """A record in the form of a conversation."""
    asked = f"Context: {record['context']}\nQuestion: {record['question']}"
    answer = record["answers"]["text"][0]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def with_bad_ones(records: list[Record]) -> list[str]:
    """The lines of a file, with a few unusable ones among them."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    turned = as_messages(records[1])
    turned["messages"].reverse()
    bad = [
        lines[0][: len(lines[0]) // 2],  # cut off
        json.dumps({**records[0], "id": "empty", "answers": {"text": [], "answer_start": []}}),
        json.dumps({**records[1], "id": "none", "question": " "}),
        json.dumps(turned),
        "",  # no record
    ]
    for place, line in enumerate(bad, start=1):
        lines.insert(place * len(records) // 6, line)
    return lines


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_all(folder: Path) -> None:
    made = {name: make_records(name, kind) for name, kind in kinds(random.Random(SEED)).items()}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([as_messages(record) for record in made["museum"]], ensure_ascii=False, indent=1)
    (folder / "museum.json").write_text(text + "\n", encoding="utf-8")
    for name in ("harbour", "harbour-zh"):
        write_lines(folder / f"{name}.jsonl", [json.dumps(record, ensure_ascii=False) for record in made[name]])
    write_lines(folder / "weather.jsonl", with_bad_ones(made["weather"]))
    (folder / "orders").mkdir(exist_ok=True)
    held_out = CONTEXTS // 4 * QUESTIONS
    for split, records in (("train", made["orders"][:-held_out]), ("test", made["orders"][-held_out:])):
        pq.write_table(pa.Table.from_pylist(records), folder / "orders" / f"{split}.parquet")
    check(made, folder)


def check(made: dict[str, list[Record]], folder: Path) -> None:
    """Assert what the recipe relies on."""
    for name, records in made.items():
        assert len({record["id"] for record in records}) == len(records) == CONTEXTS * QUESTIONS, name
        for record in records:
            (answer,) = record["answers"]["text"]
            assert record["context"].count(answer) == 1, record
            assert answer not in record["question"], record
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 500_000, size
    print(f"{len(made)} data sets, {sum(map(len, made.values()))} questions, {size} bytes")


def main() -> None:
    """Write the data sets, then check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the data sets")
    write_all(parser.parse_args().output)


if __name__ == "__main__":
    main()
