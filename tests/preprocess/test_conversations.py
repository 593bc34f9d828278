"""How conversations become samples of a run: whole for training, asked at their last answer for test, with tools,
pictures and plain texts, and what the manifest says about the data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages.contract.errors import Exit
from stages.contract.files import read_json, read_jsonl, write_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.host.runner import run_stage
from stages.preprocess import stage as preprocess
from stages.tasks import settle_recipe
from tests.conftest import REPOSITORY

FILES = ("train", "validation", "test", "validation_asked")


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., tuple[Run, Exit]]:
    """Return a function that runs the stage on a data path with overrides."""

    def prepared(path: str, *overrides: str) -> tuple[Run, Exit]:
        sets = (f"data.path={path}", "data.test_fraction=0.2", "data.validation_fraction=0.2", *overrides)
        roots = Roots(tmp_path / "data", tmp_path / "models", tmp_path / "runs")
        recipe = load_recipe(REPOSITORY / "recipes" / "chat.yaml", "tiny", sets)
        run = Run("r", settle_recipe(recipe, "chat.yaml", roots.data), roots)
        return run, run_stage(run, "preprocess", preprocess.work)

    return prepared


def samples(run: Run) -> dict[str, list[dict[str, Any]]]:
    return {name: read_jsonl(run.path("preprocess", "samples", f"{name}.jsonl")) for name in FILES}


def conversation(number: int, **more: Any) -> dict[str, Any]:
    said = [("system", f"s{number}\n "), ("user", f"<q>\n{number}"), ("assistant", f" one <image> {number}"),
            ("user", f"and {number}?"), ("assistant", f"two {number}\n")]  # fmt: skip
    return {"messages": [{"role": role, "content": text} for role, text in said], **more}


def test_samples_of_a_file(prepare: Callable[..., tuple[Run, Exit]], tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    write_jsonl(tmp_path / "data" / "chats.jsonl", [conversation(n, tools=[tool]) for n in range(20)] + [{"x": 1}])
    run, code = prepare("chats.jsonl")
    assert code == Exit.DONE
    found = samples(run)
    assert {name: len(rows) for name, rows in found.items()} == {
        "train": 13, "validation": 3, "test": 4, "validation_asked": 3,
    }  # fmt: skip
    for name, rows in found.items():
        for row in rows:
            number = row["meta"]["question"].removeprefix("and ").removesuffix("?")
            whole = json.loads(json.dumps(conversation(int(number))["messages"]).replace("<image>", "<\\u2060image>"))
            answer = whole.pop()
            asked = name in ("test", "validation_asked")
            assert row["messages"] == (whole if asked else [*whole, answer])
            assert row["meta"].get("answer") == (answer if asked else None)
            assert row["references"] == [f"two {number}\n"] and row["tools"] == [tool]
    manifest = read_json(run.path("preprocess", "manifest.json"))
    assert manifest["data"] == ["chats.jsonl: messages, 20 conversations, 1 unusable"]
    assert manifest["skipped"] == [{"what": "chats.jsonl:21", "reason": "no known form", "detail": "found the keys x"}]
    assert "pictures/" not in manifest["outputs"] and list(manifest["inputs"]) == ["data/chats.jsonl"]


def test_a_folder_of_pictures_and_texts_in_other_encodings(
    prepare: Callable[..., tuple[Run, Exit]], tmp_path: Path
) -> None:
    folder = tmp_path / "data" / "mine"
    (folder / "images").mkdir(parents=True)
    for number in range(10):
        Image.new("RGB", (3, 3), (number, 0, 0)).save(folder / "images" / f"{number}.png")
    seen = [conversation(n, images=[f"images/{n}.png"]) for n in range(10)]
    write_jsonl(folder / "seen.jsonl", seen)
    texts = "".join(
        json.dumps({"text": f"第{n}章 这是一个很长的故事。\n"}, ensure_ascii=False) + "\n" for n in range(10)
    )
    (folder / "texts.jsonl").write_bytes(texts.encode("gbk"))
    run, code = prepare("mine")
    assert code == Exit.DONE
    manifest = read_json(run.path("preprocess", "manifest.json"))
    assert manifest["encodings"] == {"texts.jsonl": "GBK"} and not manifest["skipped"]
    assert manifest["data"][1] == "texts.jsonl: text, 10 texts" and "pictures/" in manifest["outputs"]
    found = samples(run)
    for row in (row for rows in found.values() for row in rows):
        if row["meta"]["source"] == "texts":
            assert row["messages"] == [] and row["text"].startswith("第") and row["text"].endswith("。\n")
        else:
            assert [(run.folder / image).is_file() for image in row["images"]] == [True]
            assert sum(message["content"].count("<image>") for message in row["messages"]) == 1
    assert {row["meta"]["source"] for row in found["test"]} == {"seen", "texts"}


def test_pictures_of_a_file_are_beside_it(prepare: Callable[..., tuple[Run, Exit]], tmp_path: Path) -> None:
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (3, 3), (number, 0, 0)).save(folder / f"{number}.png")
    write_jsonl(folder / "seen.jsonl", [conversation(n, image=f"{n}.png") for n in range(4)])
    run, code = prepare("deep/seen.jsonl")
    assert code == Exit.DONE and not read_json(run.path("preprocess", "manifest.json"))["skipped"]


def test_given_training_conversations_that_are_tested_are_left_out(
    prepare: Callable[..., tuple[Run, Exit]], tmp_path: Path
) -> None:
    folder = tmp_path / "data" / "split"
    write_jsonl(folder / "train.jsonl", [conversation(n) for n in range(10)])
    write_jsonl(folder / "test.jsonl", [conversation(n) for n in range(9, 12)])
    run, code = prepare("split", "data.validation_fraction=0")
    assert code == Exit.DONE
    assert [row["id"] for row in samples(run)["train"]] == [f"data/train-{n}" for n in range(1, 10)]
    manifest = read_json(run.path("preprocess", "manifest.json"))
    assert [entry["what"] for entry in manifest["skipped"]] == ["data/train-10"]
    assert "; 1 of them, given for training, is like test conversations;" in manifest["data"][1]


def test_nothing_usable_ends_the_stage(
    prepare: Callable[..., tuple[Run, Exit]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "data" / "chats.jsonl", [{"Frage": "x"}])
    assert prepare("chats.jsonl")[1] == Exit.DATA
    shown = capfd.readouterr().err
    assert "1 of 1 skipped: no known form, first chats.jsonl:1 (found the keys Frage)" in shown
    assert "name the columns that hold the turns in preprocess.samples.columns" in shown
