"""Write the data of the recipe chat: invented conversations on lamps and rooms, in three forms.

    shop.jsonl       messages with a system prompt and two questions each; the second answer is code
    house.json       ShareGPT, two questions each about the temperatures of rooms
    shop-zh.csv      Alpaca in Chinese: instruction, input, output

A lamp has a watt, a price and a switch, drawn by chance. Two runs write the same bytes.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "chat"
SEED = 5
SHOP, HOUSE, CHINESE = 80, 40, 40
"""Conversations of each file."""

FIRST = ("Amber", "Birch", "Cedar", "Dune", "Ember", "Fern", "Glade", "Heath", "Iris", "Jade")
SECOND = ("Arc", "Beam", "Crown", "Drop", "Edge", "Flare", "Globe", "Halo")
ROOMS = ("attic", "bakery", "cellar", "den", "garage", "hall", "kitchen", "library", "nursery", "office")
FLOORS = ("ground floor", "first floor", "second floor", "third floor")
MATERIALS = ("竹", "铜", "木", "玻璃", "陶瓷", "纸", "石", "银")
SHAPES = ("台灯", "吊灯", "壁灯", "落地灯", "夜灯")
SYSTEM = "You answer for the lamp shop Little Lantern.\nPrices are in crowns; say nothing that you do not know."


def message(role: str, content: str) -> dict[str, str]:
    """A message."""
    return {"role": role, "content": content}


def shop(rng: random.Random) -> list[dict[str, Any]]:
    """Conversations about lamps, as messages."""
    names = [f"{first} {second}" for first in FIRST for second in SECOND]
    found = []
    for number, name in enumerate(rng.sample(names, SHOP)):
        watt, price = rng.choice((4, 5, 7, 9, 12)), rng.randrange(20, 200)
        switch = rng.choice(("a cord", "a button", "a dimmer", "no switch"))
        card = f"Lamp: {name}\nWatt: {watt}\nPrice: {price}\nSwitch: {switch}"
        asks, answers = rng.choice((
            (f"How much is the {name}?", f"The {name} costs {price} crowns."),
            (f"How many watts does the {name} take?", f"The {name} takes {watt} watts."),
            (f"Does the {name} have a switch?", f"The {name} has {switch}."),
        ))  # fmt: skip
        code = f'```python\nlamp = {{\n    "name": "{name}",\n    "watt": {watt},\n}}\n```'
        found.append({
            "id": f"shop-{number}",
            "messages": [
                message("system", f"{SYSTEM}\n\n{card}"),
                message("user", asks),
                message("assistant", answers),
                message("user", f"Write {name} with its watts as a Python dictionary, please."),
                message("assistant", f"Here it is:\n\n{code}"),
            ],
        })  # fmt: skip
    return found


def house(rng: random.Random) -> list[dict[str, Any]]:
    """Conversations about the temperatures of a house, in ShareGPT's form."""
    found = []
    for number in range(HOUSE):
        rooms = dict(zip(rng.sample(ROOMS, 3), rng.sample(range(12, 27), 3), strict=True))
        floor, asked, warmest = rng.choice(FLOORS), rng.choice(list(rooms)), max(rooms, key=lambda room: rooms[room])
        report = "\n".join(f"- {room}: {degrees} °C" for room, degrees in rooms.items())
        found.append({
            "id": f"house-{number}",
            "conversations": [
                {"from": "human", "value": f"The {floor}:\n{report}\n\nHow warm is it in the {asked}?"},
                {"from": "gpt", "value": f"It is {rooms[asked]} °C in the {asked}."},
                {"from": "human", "value": f"Which room on the {floor} is the warmest?"},
                {"from": "gpt", "value": f"The {warmest}, with {rooms[warmest]} °C."},
            ],
        })  # fmt: skip
    return found


def shop_in_chinese(rng: random.Random) -> list[list[str]]:
    """Questions about lamps with a card each, in Alpaca's form."""
    rows = []
    for material, shape in rng.sample([(material, shape) for material in MATERIALS for shape in SHAPES], CHINESE):
        name, watt, price = f"{material}{shape}", rng.choice((4, 5, 7, 9)), rng.randrange(20, 200)
        card = f"名称：{name}\n功率：{watt}瓦\n价格：{price}元"
        ask, answer = rng.choice((
            (f"{name}多少钱？", f"{name}的价格是{price}元。"),
            (f"{name}的功率是多少？", f"{name}的功率是{watt}瓦。"),
        ))  # fmt: skip
        rows.append([ask, card, answer])
    return rows


def main() -> None:
    """Write the three files."""
    HERE.mkdir(exist_ok=True)
    rng = random.Random(SEED)
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in shop(rng))
    (HERE / "shop.jsonl").write_text(lines, encoding="utf-8")
    (HERE / "house.json").write_text(json.dumps(house(rng), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    with (HERE / "shop-zh.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["instruction", "input", "output"], *shop_in_chinese(rng)])


if __name__ == "__main__":
    main()
