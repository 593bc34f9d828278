"""Write the data of the recipe logic-choice: closed-world puzzles with known answers.

A problem is a few facts and two or three single-choice questions on them, each with two to seven options. What the
facts do not say or imply is false. There are six kinds, each in English and some in Chinese:

    week      who comes on which day, by its name or as a number of days after somebody else
    clubs     who is in which club, from lists of members
    chain     what is on, from rules "if A is on, B is on" and one thing that was switched on
    family    how two people are related, from parents and children
    honest    where things are, from people who always tell the truth or always lie
    hats      who wears which colour, from statements and by elimination

Options with a natural order keep it (yes and no, numbers, days); names are shuffled. The same arguments give the same
bytes. The folder has `train.jsonl`, `test.jsonl` (with answers only after --answers), `sources/more.jsonl` (further
problems) and `labels/`: guessed answers to the questions of `test.jsonl`, of which seven in eight are right in
`guessed-a` and three in four in `guessed-b`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "logic-choice"
LETTERS = "ABCDEFG"
CHINESE_EVERY = 17
LABELS = {"guessed-a": 7 / 8, "guessed-b": 3 / 4}
"""Name of a file of guessed answers, and the share of them that is right."""

Item = tuple[str, list[str], str]
"""A question, its options, and the right one."""
Puzzle = tuple[list[str], list[Item]]
"""Sentences, and questions on them."""

NAMES = (
    ("Ann", "Ben", "Carl", "Dora", "Emma", "Fred", "Grace", "Henry", "Ivan", "Jane", "Kate", "Leo", "Mary", "Nick",
     "Olga", "Paul", "Rose", "Sam", "Tom", "Vera"),
    ("小明", "小红", "小刚", "小丽", "小华", "小军", "小芳", "小强", "小云", "小东"),
)  # fmt: skip
DAYS = (("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"))  # fmt: skip
CLUBS = (("chess", "music", "dance", "tennis", "film", "garden"), ("象棋", "音乐", "舞蹈", "网球", "电影", "园艺"))
DEVICES = (
    ("lamp", "fan", "pump", "bell", "radio", "heater", "motor"),
    ("灯", "风扇", "水泵", "电铃", "收音机", "电机"),
)
THINGS = (("key", "coin", "ring", "book", "map"), ("钥匙", "硬币", "戒指", "书", "地图"))
PLACES = (("box", "bag", "drawer", "jar"), ("盒子", "袋子", "抽屉", "罐子"))
COLOURS = (("red", "blue", "green", "white", "black"), ("红", "蓝", "绿", "白", "黑"))
RELATIONS = (("parent", "grandparent", "child", "grandchild", "brother or sister", "none of these"),
             ("父母", "祖父母", "孩子", "孙辈", "兄弟姐妹", "都不是"))  # fmt: skip
YES_NO = (("Yes", "No"), ("是", "否"))


def yes_no(zh: int, question: str, yes: bool) -> Item:
    return question, list(YES_NO[zh]), YES_NO[zh][not yes]


def who(rng: random.Random, question: str, names: list[str], right: str) -> Item:
    return question, rng.sample(names, len(names)), right


def week(rng: random.Random, zh: int) -> Puzzle:
    first, second, third, nobody = rng.sample(NAMES[zh], 4)
    day, other = rng.sample(range(6), 2)
    days = {first: day, second: other, third: day + 1}
    clue, after = (("{} comes on {}.", "{} comes the day after {}."), ("{}{}来。", "{}在{}之后一天来。"))[zh]
    clauses = [clue.format(first, DAYS[zh][day]), clue.format(second, DAYS[zh][other]), after.format(third, first)]
    rng.shuffle(clauses)
    asked, one, two = rng.choice([first, second, third]), *rng.sample([first, second, third], 2)
    some_day = rng.choice([days[one], days[two]])
    ask = (("On which day does {} come?", "Does {} come on {}?", "Does {} come on any day?"),
           ("{}哪天来？", "{}{}来吗？", "{}有哪天来吗？"))[zh]  # fmt: skip
    comes = rng.choice([asked, nobody])
    return clauses, [
        (ask[0].format(asked), list(DAYS[zh]), DAYS[zh][days[asked]]),
        yes_no(zh, ask[1].format(one, DAYS[zh][some_day]), days[one] == some_day),
        yes_no(zh, ask[2].format(comes), comes == asked),
    ]


def clubs(rng: random.Random, zh: int) -> Puzzle:
    names, kinds = rng.sample(NAMES[zh], 6), rng.sample(CLUBS[zh], 3)
    members = {club: rng.sample(names[:5], rng.choice((1, 2, 3))) for club in kinds}
    clue = ("In the {} club: {}.", "{}社的成员：{}。")[zh]
    clauses = [clue.format(club, (", ", "、")[zh].join(inside)) for club, inside in members.items()]
    club, counted = rng.choice(kinds), rng.choice(names)
    inside, outside = rng.choice(members[club]), [name for name in names if name not in members[club]]
    one = rng.choice([inside, rng.choice(outside)])
    asked = rng.choice([inside, names[5]])
    counts = (("none", "one", "two", "all three"), ("零个", "一个", "两个", "三个"))[zh]
    ask = (("Is {} in the {} club?", "How many clubs is {} in?", "Is {} in any club?", "Who is in the {} club?"),
           ("{}是{}社的成员吗？", "{}参加了几个社？", "{}参加了哪个社吗？", "以下谁在{}社？"))[zh]  # fmt: skip
    return clauses, [
        yes_no(zh, ask[0].format(one, club), one in members[club]),
        (ask[1].format(counted), list(counts), counts[sum(counted in each for each in members.values())]),
        yes_no(zh, ask[2].format(asked), any(asked in each for each in members.values())),
        who(rng, ask[3].format(club), [inside, *rng.sample(outside, 2)], inside),
    ]


def chain(rng: random.Random, zh: int) -> Puzzle:
    things = rng.sample(DEVICES[zh], 5)
    rules = list(pairwise(things[:4]))
    start = rng.choice((0, 1, 2))
    running = things[start:4]
    clue = ("If the {} is on, the {} is on.", "如果{}开着，{}就开着。")[zh]
    clauses = [clue.format(*rule) for rule in rng.sample(rules, len(rules))]
    clauses.append(("The {} was switched on.", "{}被打开了。")[zh].format(things[start]))
    one = rng.choice([rng.choice(running), rng.choice([thing for thing in things if thing not in running])])
    ask = (("Is the {} on?", "How many things are on?"), ("{}开着吗？", "一共有几个开着？"))[zh]
    return clauses, [
        yes_no(zh, ask[0].format(one), one in running),
        (ask[1], ["1", "2", "3", "4", "5"], str(len(running))),
    ]


def family(rng: random.Random, zh: int) -> Puzzle:
    old, elder, younger, child, stranger = rng.sample(NAMES[zh], 5)
    clue = ("{} is a child of {}.", "{}是{}的孩子。")[zh]
    clauses = [clue.format(*pair) for pair in ((elder, old), (younger, old), (child, elder))]
    rng.shuffle(clauses)
    known = {(old, elder): 0, (old, younger): 0, (elder, child): 0, (old, child): 1, (elder, younger): 4}
    known |= {(b, a): {0: 2, 1: 3, 4: 4}[which] for (a, b), which in known.items()}
    ask = (("What is {} to {}?", "Is {} a child of {}?"), ("{}是{}的什么人？", "{}是{}的孩子吗？"))[zh]
    pair = rng.choice([*known, (stranger, rng.choice([old, elder, child]))])
    child_of = [pair for pair, which in known.items() if which == 2]
    one, two = rng.choice([rng.choice(child_of), rng.choice([pair for pair in known if pair not in child_of])])
    return clauses, [
        (ask[0].format(*pair), list(RELATIONS[zh]), RELATIONS[zh][known.get(pair, 5)]),
        yes_no(zh, ask[1].format(one, two), (one, two) in child_of),
        yes_no(zh, ask[1].format(two, one), (two, one) in child_of),
    ]


def honest(rng: random.Random, zh: int) -> Puzzle:
    people, things = rng.sample(NAMES[zh], 2), rng.sample(THINGS[zh], 2)
    here, there = rng.sample(PLACES[zh], 2)
    truthful = [rng.random() < 0.5, rng.random() < 0.5]
    rule = (("{} always lies.", "{}总说假话。"), ("{} always tells the truth.", "{}总说真话。"))
    clauses = [rule[honest][zh].format(name) for name, honest in zip(people, truthful, strict=True)]
    both = ("The {} and the {} are each in the {} or the {}.", "{}和{}各自在{}或{}里。")[zh]
    clauses = [both.format(*things, here, there), *rng.sample(clauses, 2)]
    says = ('{} says: "The {} is in the {}."', "{}说：“{}在{}里。”")[zh]
    claims = [rng.choice([here, there]) for _ in people]
    clauses += [says.format(*each) for each in zip(people, things, claims, strict=True)]
    is_in = [
        claim if honest else (there if claim == here else here) for claim, honest in zip(claims, truthful, strict=True)
    ]
    ask = (
        ("Is the {} in the {}?", "Does {} lie?", "How many of them lie?"),
        ("{}在{}里吗？", "{}说谎吗？", "几个人说谎？"),
    )
    which, place = rng.randrange(2), rng.choice([here, there])
    return clauses, [
        yes_no(zh, ask[zh][0].format(things[which], place), is_in[which] == place),
        yes_no(zh, ask[zh][1].format(people[which]), not truthful[which]),
        (ask[zh][2], ["0", "1", "2"], str(2 - sum(truthful))),
    ]


def hats(rng: random.Random, zh: int) -> Puzzle:
    people, colours = rng.sample(NAMES[zh], 3), rng.sample(COLOURS[zh], 3)
    intro = ("{}, {} and {} wear a {}, a {} and a {} hat.", "{}、{}和{}各戴一顶帽子，颜色是{}、{}和{}。")[zh]
    shown, hidden, rest = rng.sample(range(3), 3)
    wears = ("The hat of {} is {}.", "{}的帽子是{}色。")[zh]
    lacks = ("The hat of {} is not {}.", "{}的帽子不是{}色。")[zh]
    clues = [wears.format(people[shown], colours[shown]), lacks.format(people[hidden], colours[rest])]
    clauses = [intro.format(*people, *rng.sample(colours, 3)), *rng.sample(clues, 2)]
    asked = rng.choice([shown, hidden, shown, rest])
    colour = rng.choice([asked, asked, *(other for other in range(3) if other != asked)])
    ask = (("Which colour is the hat of {}?", "Is the hat of {} {}?", "Who wears the {} hat?"),
           ("{}的帽子是什么颜色？", "{}的帽子是{}色吗？", "谁戴{}色的帽子？"))[zh]  # fmt: skip
    return clauses, [
        (ask[0].format(people[asked]), list(COLOURS[zh]), colours[asked]),
        yes_no(zh, ask[1].format(people[asked], colours[colour]), asked == colour),
        who(rng, ask[2].format(colours[colour]), people, people[colour]),
    ]


KINDS: dict[str, Callable[[random.Random, int], Puzzle]] = {
    "week": week, "clubs": clubs, "chain": chain, "family": family, "honest": honest, "hats": hats
}  # fmt: skip


def make_problem(
    seed: int, prefix: str, number: int, kinds: Sequence[str] = tuple(KINDS), most_options: int = len(LETTERS)
) -> dict[str, Any]:
    """Problem `number` of a file: kind and language alternate, all else is random."""
    rng = random.Random(f"{seed}-{prefix}-{number}")
    kind = kinds[number % len(kinds)]
    zh = int(number % CHINESE_EVERY == CHINESE_EVERY - 1)
    clauses, items = KINDS[kind](rng, zh)
    items = [item for item in items if len(item[1]) <= most_options]
    questions = []
    for question, options, right in rng.sample(items, min(rng.choice((2, 2, 3)), len(items))):
        assert right in options and len(set(options)) == len(options) and 2 <= len(options) <= 7, (kind, question)
        questions.append({"question": question, "options": options, "answer": LETTERS[options.index(right)]})
    return {"id": f"{prefix}-{kind}-{number:04}", "problem": ("" if zh else " ").join(clauses), "questions": questions}


def make_file(
    seed: int, prefix: str, count: int, kinds: Sequence[str] = tuple(KINDS), most_options: int = len(LETTERS)
) -> list[dict[str, Any]]:
    """`count` problems, no two with the same text."""
    found: dict[str, dict[str, Any]] = {}
    number = 0
    while len(found) < count:
        problem = make_problem(seed, prefix, number, kinds, most_options)
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


def make(
    folder: Path,
    seed: int,
    train: int,
    test: int,
    more: int,
    answers: bool,
    kinds: Sequence[str] = tuple(KINDS),
    most_options: int = len(LETTERS),
) -> None:
    """Write a data folder."""
    tested = make_file(seed, "test", test, kinds, most_options)
    known = {problem["problem"] for problem in tested}
    write(folder / "test.jsonl", tested if answers else [without_answers(problem) for problem in tested])
    for name, prefix, count in (("train.jsonl", "train", train), ("sources/more.jsonl", "more", more)):
        made = make_file(seed, prefix, count, kinds, most_options)
        write(folder / name, [problem for problem in made if problem["problem"] not in known])
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
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--most-options", type=int, default=len(LETTERS), choices=range(2, 8), help="options of a question"
    )
    chosen = parser.parse_args()
    make(
        chosen.output,
        chosen.seed,
        chosen.train,
        chosen.test,
        chosen.more,
        chosen.answers,
        chosen.kinds,
        chosen.most_options,
    )


if __name__ == "__main__":
    main()
