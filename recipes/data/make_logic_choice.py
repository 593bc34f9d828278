"""Write closed-world puzzles with known answers: the data of the recipe logic-choice.

A problem is a few facts and two or three single-choice questions on them, each with two to seven options. What the
facts do not say or imply is false. There are six kinds, each in English and now and then in Chinese:

    order     who stands where in a row, from neighbours named in any order
    clubs     who is in which club, from lists of members
    chain     what is on, from rules "if A is on, B is on" and one thing that was switched on
    family    grandparents, children and siblings, from parents and children
    honest    where things are, from people who always tell the truth or always lie
    hats      who wears which colour, one each, by elimination

Two runs with the same arguments write the same bytes. In the folder are then `train.jsonl`, `test.jsonl` (without
answers, or with them after --answers), `sources/more.jsonl` (further problems) and `labels/`, answers to the questions
of `test.jsonl` that somebody guessed: of `guessed-a` seven in eight are right, of `guessed-b` three in four.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "logic-choice"
LETTERS = "ABCDEFG"
CHINESE_EVERY = 17
LABELS = {"guessed-a": 7 / 8, "guessed-b": 3 / 4}
"""Name of a file of guessed answers, and the share of them that is right."""

Item = tuple[str, list[str], str]
"""A question, its options in any order, and the right one."""
Puzzle = tuple[str, list[Item]]

NAMES = (
    ("Ann", "Ben", "Carl", "Dora", "Emma", "Fred", "Grace", "Henry", "Ivan", "Jane", "Kate", "Leo", "Mary", "Nick",
     "Olga", "Paul", "Rose", "Sam", "Tom", "Vera"),
    ("小明", "小红", "小刚", "小丽", "小华", "小军", "小芳", "小强", "小云", "小东"),
)  # fmt: skip
CLUBS = (("chess", "music", "dance", "tennis", "film", "garden"), ("象棋", "音乐", "舞蹈", "网球", "电影", "园艺"))
DEVICES = (
    ("lamp", "fan", "pump", "bell", "radio", "heater", "motor"),
    ("灯", "风扇", "水泵", "电铃", "收音机", "电机"),
)
THINGS = (("key", "coin", "ring", "book", "map"), ("钥匙", "硬币", "戒指", "书", "地图"))
PLACES = (("box", "bag", "drawer", "jar"), ("盒子", "袋子", "抽屉", "罐子"))
COLOURS = (("red", "blue", "green", "white", "black"), ("红", "蓝", "绿", "白", "黑"))
YES_NO = (("Yes", "No"), ("是", "否"))
NONE = ("none", "都不是")


def order(rng: random.Random, zh: int) -> Puzzle:
    row = rng.sample(NAMES[zh], rng.choice((3, 3, 4, 4, 5, 7) if not zh else (3, 4)))
    pairs = list(pairwise(row))
    rng.shuffle(pairs)
    clue = ("{} stands right before {}.", "{}紧挨着站在{}前面。")[zh]
    told = [clue.format(*pair) for pair in pairs]
    place = rng.randrange(len(row) - 1)
    first, last = rng.sample(range(len(row)), 2)
    ask = (("Who is first?", "Who is last?", "Who stands right after {}?", "Does {} stand somewhere before {}?"),
           ("谁排在第一？", "谁排在最后？", "谁紧跟在{}后面？", "{}是否排在{}前面？"))[zh]  # fmt: skip
    items: list[Item] = [
        (ask[0], list(row), row[0]),
        (ask[1], list(row), row[-1]),
        (ask[2].format(row[place]), [name for name in row if name != row[place]], row[place + 1]),
        (ask[3].format(row[first], row[last]), list(YES_NO[zh]), YES_NO[zh][first > last]),
    ]
    return _told(told, zh), items


def clubs(rng: random.Random, zh: int) -> Puzzle:
    names = rng.sample(NAMES[zh], 7)
    kinds = rng.sample(CLUBS[zh], 3)
    sizes = rng.choice(((2, 2, 2), (2, 1, 2), (1, 2, 3)))
    members, left = {}, list(names)
    for club, size in zip(kinds, sizes, strict=True):
        members[club], left = left[:size], left[size:]
    clue = ("In the {} club: {}.", "{}社的成员：{}。")[zh]
    told = [clue.format(club, (", ", "、")[zh].join(who)) for club, who in members.items()]
    club = rng.choice(kinds)
    who = rng.choice([rng.choice(members[club]), rng.choice(left)])
    inside = rng.choice(members[club])
    asked = rng.choice([inside, inside, rng.choice(left)])
    among = next((name for name, its in members.items() if asked in its), NONE[zh])
    others = [name for name in names if name not in members[club]]
    ask = (("Is {} in the {} club?", "Which club is {} in?", "Who of these is in the {} club?"),
           ("{}是{}社的成员吗？", "{}在哪个社？", "以下谁在{}社？"))[zh]  # fmt: skip
    return _told(told, zh), [
        (ask[0].format(who, club), list(YES_NO[zh]), YES_NO[zh][who not in members[club]]),
        (ask[1].format(asked), [*kinds, NONE[zh]], among),
        (ask[2].format(club), [inside, *rng.sample(others, 3)], inside),
    ]


def chain(rng: random.Random, zh: int) -> Puzzle:
    things = rng.sample(DEVICES[zh], 5)
    rules = list(pairwise(things[:4]))
    start = rng.choice((0, 1, 1, 2))
    running = things[start:4]
    rng.shuffle(rules)
    clue = ("If the {} is on, the {} is on.", "如果{}开着，{}就开着。")[zh]
    told = [clue.format(*rule) for rule in rules]
    told.append(("The {} was switched on.", "{}被打开了。")[zh].format(things[start]))
    one = rng.choice([rng.choice(running[1:]), rng.choice([thing for thing in things if thing not in running])])
    is_on = rng.choice(running[1:])
    is_off = [thing for thing in things if thing not in running]
    ask = (("Is the {} on?", "Which of these is on?", "How many things are on?"),
           ("{}开着吗？", "以下哪个开着？", "一共有几个开着？"))[zh]  # fmt: skip
    return _told(told, zh), [
        (ask[0].format(one), list(YES_NO[zh]), YES_NO[zh][one not in running]),
        (ask[1], [is_on, *is_off], is_on),
        (ask[2], ["1", "2", "3", "4", "5"], str(len(running))),
    ]


def family(rng: random.Random, zh: int) -> Puzzle:
    old, elder, younger, child, cousin = rng.sample(NAMES[zh], 5)
    clue = ("{} is a child of {}.", "{}是{}的孩子。")[zh]
    told = [clue.format(*pair) for pair in ((elder, old), (younger, old), (child, elder), (cousin, younger))]
    rng.shuffle(told)
    everyone = [old, elder, younger, child, cousin]
    parent = {elder: old, younger: old, child: elder, cousin: younger}
    of = rng.choice(list(parent))
    ask = (("Who is the parent of {}?", "Who is the grandparent of {}?", "Who is the brother or sister of {}?",
            "Is {} a grandchild of {}?"),
           ("{}的父母是谁？", "{}的祖父母是谁？", "{}的兄弟姐妹是谁？", "{}是{}的孙辈吗？"))[zh]  # fmt: skip
    grand = rng.choice([child, cousin])
    one, other = rng.choice([(elder, younger), (younger, elder)])
    young, above = rng.choice([(grand, old), (grand, old), (grand, parent[grand]), (one, old)])
    return _told(told, zh), [
        (ask[0].format(of), [name for name in everyone if name != of], parent[of]),
        (ask[1].format(grand), [name for name in everyone if name != grand], old),
        (ask[2].format(one), [name for name in everyone if name != one], other),
        (ask[3].format(young, above), list(YES_NO[zh]), YES_NO[zh][not (young == grand and above == old)]),
    ]


def honest(rng: random.Random, zh: int) -> Puzzle:
    one, other = rng.sample(NAMES[zh], 2)
    thing, second = rng.sample(THINGS[zh], 2)
    here, there = rng.sample(PLACES[zh], 2)
    truthful = {one: rng.random() < 0.5}
    truthful[other] = rng.random() < 0.4
    rule = (("{} always tells the truth.", "{}总说真话。"), ("{} always lies.", "{}总说假话。"))
    told = [rule[not truthful[who]][zh].format(who) for who in (one, other)]
    rng.shuffle(told)
    both = ("The {a} and the {b} are each in the {c} or the {d}.", "{a}和{b}各自在{c}或{d}里。")[zh]
    told.insert(0, both.format(a=thing, b=second, c=here, d=there))
    says = ('{} says: "The {} is in the {}."', "{}说：“{}在{}里。”")[zh]
    claims = {one: (thing, rng.choice([here, there])), other: (second, rng.choice([here, there]))}
    told += [says.format(who, *claim) for who, claim in claims.items()]
    where = {
        what: place if truthful[who] else (there if place == here else here) for who, (what, place) in claims.items()
    }
    ask = (("Where is the {}?", "Is the {} in the {}?"), ("{}在哪里？", "{}在{}里吗？"))[zh]
    liars = (("nobody", one, other, "both"), ("没有人", one, other, "两人都说谎"))[zh]
    count = sum(not honest for honest in truthful.values())
    liar = (
        liars[3] if count == 2 else liars[0] if count == 0 else next(w for w, honest in truthful.items() if not honest)
    )
    place = rng.choice([here, there])
    return _told(told, zh), [
        (ask[0].format(thing), [here, there], where[thing]),
        (ask[1].format(second, place), list(YES_NO[zh]), YES_NO[zh][where[second] != place]),
        (("Who lies?", "谁说谎？")[zh], list(liars), liar),
    ]


def hats(rng: random.Random, zh: int) -> Puzzle:
    people, colours = rng.sample(NAMES[zh], 3), rng.sample(COLOURS[zh], 3)
    intro = ("{}, {} and {} wear a {}, a {} and a {} hat.", "{}、{}和{}各戴一顶帽子，颜色是{}、{}和{}。")[zh]
    listed = rng.sample(colours, 3)
    told = [intro.format(*people, *listed)]
    shown, hidden = rng.sample(range(3), 2)
    rest = 3 - shown - hidden
    wears = ("The hat of {} is {}.", "{}的帽子是{}色。")[zh]
    lacks = ("The hat of {} is not {}.", "{}的帽子不是{}色。")[zh]
    clues = [wears.format(people[shown], colours[shown]), lacks.format(people[hidden], colours[rest])]
    rng.shuffle(clues)
    told += clues
    who = rng.choice([hidden, rest])
    colour = rng.choice([hidden, rest])
    other = rng.choice([hidden, rest])
    ask = (("Which hat has {}?", "Who wears the {} hat?", "Is the hat of {} {}?"),
           ("{}的帽子是什么颜色？", "谁戴{}色的帽子？", "{}的帽子是{}色吗？"))[zh]  # fmt: skip
    return _told(told, zh), [
        (ask[0].format(people[who]), list(listed), colours[who]),
        (ask[1].format(colours[colour]), list(people), people[colour]),
        (ask[2].format(people[hidden], colours[other]), list(YES_NO[zh]), YES_NO[zh][other != hidden]),
    ]


KINDS: dict[str, Callable[[random.Random, int], Puzzle]] = {
    "order": order, "clubs": clubs, "chain": chain, "family": family, "honest": honest, "hats": hats
}  # fmt: skip


def _told(sentences: list[str], zh: int) -> str:
    return ("" if zh else " ").join(sentences)


def make_problem(seed: int, prefix: str, number: int) -> dict[str, Any]:
    """Problem `number` of a file: its kind and its language go in turn, all else is drawn."""
    rng = random.Random(f"{seed}-{prefix}-{number}")
    kind = list(KINDS)[number % len(KINDS)]
    problem, items = KINDS[kind](rng, int(number % CHINESE_EVERY == CHINESE_EVERY - 1))
    questions = []
    for question, options, right in rng.sample(items, rng.choice((2, 2, 3))):
        assert right in options and len(set(options)) == len(options) and 2 <= len(options) <= 7, (kind, question)
        if len(options) > 2 or options[0] not in {pair[0] for pair in YES_NO}:
            rng.shuffle(options)
        questions.append({"question": question, "options": options, "answer": LETTERS[options.index(right)]})
    return {"id": f"{prefix}-{kind}-{number:04}", "problem": problem, "questions": questions}


def make_file(seed: int, prefix: str, count: int) -> list[dict[str, Any]]:
    """`count` problems, no two with the same text."""
    found: dict[str, dict[str, Any]] = {}
    number = 0
    while len(found) < count:
        problem = make_problem(seed, prefix, number)
        found.setdefault(problem["problem"], problem)
        number += 1
    return list(found.values())


def guess(rng: random.Random, problem: dict[str, Any], right: float) -> dict[str, Any]:
    """Answers to a problem's questions, each right with that probability, else another of its options."""
    answers = []
    for question in problem["questions"]:
        others = [letter for letter in LETTERS[: len(question["options"])] if letter != question["answer"]]
        answers.append({"answer": question["answer"] if rng.random() < right else rng.choice(others)})
    return {"id": problem["id"], "questions": answers}


def without_answers(problem: dict[str, Any]) -> dict[str, Any]:
    return {**problem, "questions": [{k: v for k, v in q.items() if k != "answer"} for q in problem["questions"]]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make(folder: Path, seed: int, train: int, test: int, more: int, answers: bool) -> None:
    """Write a data folder."""
    tested = make_file(seed, "test", test)
    known = {problem["problem"] for problem in tested}
    write(folder / "test.jsonl", tested if answers else [without_answers(problem) for problem in tested])
    for name, prefix, count in (("train.jsonl", "train", train), ("sources/more.jsonl", "more", more)):
        write(folder / name, [problem for problem in make_file(seed, prefix, count) if problem["problem"] not in known])
    for name, right in LABELS.items():
        rng = random.Random(f"{seed}-{name}")
        write(folder / "labels" / f"{name}.jsonl", [guess(rng, problem, right) for problem in tested])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--train", type=int, default=320, help="problems in train.jsonl")
    parser.add_argument("--test", type=int, default=80, help="problems in test.jsonl")
    parser.add_argument("--more", type=int, default=80, help="problems in sources/more.jsonl")
    parser.add_argument("--answers", action="store_true", help="test.jsonl keeps its answers")
    arguments = parser.parse_args()
    make(arguments.output, arguments.seed, arguments.train, arguments.test, arguments.more, arguments.answers)


if __name__ == "__main__":
    main()
