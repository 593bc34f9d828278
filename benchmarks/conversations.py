"""Seconds and memory that the task chat takes to read conversations and to find their near-duplicates, by size and form
of the file. One in twenty is a copy of another with three other words; the last column says how many are found.

python -m benchmarks.conversations
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.rows import write_rows
from stages.tasks.chat.conversations import Reading, grouped_questions

WORDS, VOCABULARY = 160, 20_000
"""Words of a conversation, about 1,000 characters, and different ones in all."""
COPIES = 20
"""One in so many conversations is copied."""


def conversations(count: int) -> Iterator[dict[str, Any]]:
    """So many conversations, the copies last. Words are as frequent as in a language: by their rank."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(VOCABULARY)]
    weights = list(accumulate(1 / rank for rank in range(1, VOCABULARY + 1)))
    copied = []
    for number in range(count):
        if number < count - count // COPIES:
            said = draw.choices(words, cum_weights=weights, k=WORDS)
            copied += [said] if len(copied) < count // COPIES else []
        else:
            said = list(copied[number - count])
            for place in draw.sample(range(WORDS), 3):
                said[place] = "other"
        asked, answer = " ".join(said[: WORDS // 2]), " ".join(said[WORDS // 2 :])
        yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def write(path: Path, count: int) -> None:
    """Write a file of conversations, as JSON Lines or as an indented array."""
    with path.open("w", encoding="utf-8") as file:
        array = path.suffix == ".json"
        file.write("[" if array else "")
        for number, one in enumerate(conversations(count)):
            file.write((",\n" if array and number else "") + json.dumps(one, indent=1 if array else None))
            file.write("" if array else "\n")
        file.write("]" if array else "")


def measure(path: Path, count: int) -> dict[str, Any]:
    """Read a file, find its near-duplicates, and return the row."""
    with tempfile.TemporaryDirectory() as pictures:
        began = time.process_time()
        found = Reading(path, Path(pictures), None, {}, lambda *_: None).questions(lambda _: None)
    read = time.process_time()
    grouped = grouped_questions(found, 0.8, lambda _: None)
    copies = count // COPIES
    groups = [question.group for question in grouped]
    return {
        "file": path.suffix.removeprefix("."),
        "conversations": count,
        "MB": round(path.stat().st_size / 1e6),
        "read, s CPU": round(read - began, 1),
        "near-duplicates, s CPU": round(time.process_time() - read, 1),
        "peak memory, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "copies found": f"{sum(groups[n] == groups[count - copies + n] for n in range(copies)):,} of {copies:,}",
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
        sys.exit()
    rows = []
    for ending, count in (("jsonl", 20_000), ("jsonl", 100_000), ("json", 40_000)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"chats.{ending}"
            write(path, count)
            again = [sys.executable, "-m", "benchmarks.conversations", str(path), str(count)]
            rows.append(json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout))
    write_rows("conversations", rows, "python -m benchmarks.conversations")
