"""Shards and nodes: what the command line and the environment may say, and what a shard does to a run folder."""

import json
import subprocess
from pathlib import Path

import pytest

from stages.contract.errors import UsageError
from stages.contract.part import Node, Part, Shard, requested_part
from tests.conftest import REPOSITORY, Lorry

MEETING = {"LORRY_NODES": "3", "LORRY_RENDEZVOUS": "node-0.train:29500"}


@pytest.mark.parametrize(
    ("option", "environment", "expected"),
    [
        (None, {}, None),
        ("1/4", {}, Shard(1, 4)),
        ("0/1", {}, Shard(0, 1)),
        (None, {"LORRY_SHARD": "2/3"}, Shard(2, 3)),
        ("1/4", {"LORRY_SHARD": "2/3"}, Shard(1, 4)),
        (None, {"LORRY_SHARD": ""}, None),
        (None, {"JOB_COMPLETION_INDEX": "2", "LORRY_SHARDS": "3"}, Shard(2, 3)),
        (None, {"JOB_COMPLETION_INDEX": "2"}, None),
        (None, {"JOB_COMPLETION_INDEX": "2", "LORRY_SHARDS": ""}, None),
        (None, {"LORRY_SHARDS": "3"}, None),  # the merge step's Job has the same settings, but no index
        (None, {**MEETING, "LORRY_NODE_RANK": "2"}, Node(2, 3, "node-0.train:29500")),
        (None, {**MEETING, "JOB_COMPLETION_INDEX": "1"}, Node(1, 3, "node-0.train:29500")),
        (None, {"LORRY_NODES": "1"}, None),
        (None, {"LORRY_NODES": "", "LORRY_RENDEZVOUS": ""}, None),
    ],
)
def test_what_is_asked_for(option: str | None, environment: dict[str, str], expected: Part) -> None:
    assert requested_part("train", option, environment) == expected


@pytest.mark.parametrize(
    ("option", "environment", "message"),
    [
        ("3/3", {}, "--shard 3/3: not a shard I/N, counted from 0"),
        ("x", {}, "--shard x:"),
        ("0/0", {}, "--shard 0/0:"),
        ("", {}, "--shard :"),
        ("-1/3", {}, "--shard -1/3:"),
        (None, {"LORRY_SHARD": "4/3"}, "LORRY_SHARD 4/3:"),
        (None, {"JOB_COMPLETION_INDEX": "3", "LORRY_SHARDS": "3"}, "JOB_COMPLETION_INDEX/LORRY_SHARDS 3/3:"),
        (None, {"LORRY_NODES": "two"}, "LORRY_NODES two:"),
        (None, {"LORRY_NODES": "0"}, "LORRY_NODES 0:"),
        (None, MEETING, "LORRY_NODE_RANK: found no value; with LORRY_NODES 3 set it to a number from 0 to 2"),
        (None, {**MEETING, "LORRY_NODE_RANK": "3"}, "LORRY_NODE_RANK: found 3; with LORRY_NODES 3"),
        (None, {"LORRY_NODES": "2", "LORRY_NODE_RANK": "0"}, "LORRY_RENDEZVOUS: found no value; set it to host:port"),
        (
            None,
            {"LORRY_NODES": "2", "LORRY_NODE_RANK": "0", "LORRY_RENDEZVOUS": "host"},
            "LORRY_RENDEZVOUS: found host; set it",
        ),
        (None, {"LORRY_NODE_RANK": "0"}, "LORRY_NODES: not set, but LORRY_NODE_RANK or LORRY_RENDEZVOUS is"),
        ("0/2", {**MEETING, "LORRY_NODE_RANK": "0"}, "shard 0/2 on 3 nodes"),
    ],
)
def test_wrong_or_half_given_values(option: str | None, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        requested_part("train", option, environment)
    assert message in str(raised.value)


def test_nodes_are_for_training_and_shards_not_for_eval() -> None:
    assert requested_part("infer", None, {**MEETING, "LORRY_NODE_RANK": "0"}) is None
    assert requested_part("eval", None, {"JOB_COMPLETION_INDEX": "0"}) is None
    for option, environment in (("0/2", {}), (None, {"LORRY_SHARD": "0/2"})):
        with pytest.raises(UsageError, match="eval has no shards; run it once, without --shard and LORRY_SHARD"):
            requested_part("eval", option, environment)


@pytest.mark.parametrize("command", ["preprocess", "train", "infer", "eval"])
def test_a_bad_shard_is_one_line_and_exit_code_2(lorry: Lorry, command: str) -> None:
    finished = lorry(f"entrypoints.{command}", "patent-qa", "--shard", "3/3")
    assert (finished.code, len(finished.lines)) == (2, 1)
    assert list(lorry.runs.iterdir()) == []


# -- the runner ----------------------------------------------------------------------------------------------------


class Sharded:
    """Runs `some_stage` in shards."""

    def __init__(self, lorry: Lorry, recipe: Path) -> None:
        self.lorry, self.recipe = lorry, recipe
        self.run = lorry.runs / "r"

    def __call__(self, work: str, *options: str) -> tuple[int, list[str]]:
        finished = self.lorry("tests.contract.some_stage", work, str(self.recipe), *options)
        return finished.code, finished.lines

    def start(self, work: str, *options: str) -> "subprocess.Popen[str]":
        return self.lorry.start("tests.contract.some_stage", work, str(self.recipe), *options)


@pytest.fixture
def sharded(small_mounts: Lorry, recipe_file: Path) -> Sharded:
    return Sharded(small_mounts, recipe_file)


def test_a_shard_writes_only_into_its_own_folder_and_is_skipped_when_done(sharded: Sharded) -> None:
    assert sharded("write", "--shard", "0/2")[0] == 0
    assert {path.name for path in sharded.run.iterdir()} == {"recipe.yaml", "shards"}
    folder = sharded.run / "shards" / "preprocess" / "0-of-2"
    assert {"manifest.json", "events.jsonl", "log.txt", ".lock"} <= {path.name for path in folder.iterdir()}
    assert sharded("write", "--shard", "0/2") == (0, ["preprocess 0/2: up to date"])


def test_shards_and_the_stage_run_at_the_same_time(sharded: Sharded) -> None:
    started = [sharded.start("wait", "--shard", f"{i}/2") for i in range(2)]
    started.append(sharded.start("wait"))
    try:
        for process in started:
            assert process.stdout is not None
            assert any("waiting" in line for line in iter(process.stdout.readline, ""))
        code, lines = sharded("write", "--shard", "1/2")
        assert code == 75 and "is running this stage" in lines[0]
        status = sharded.lorry("entrypoints.lorry", "status")
        assert "0 of 2 shards done, 2 running" in status.output
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_finished_shards_of_the_same_key_are_noted_others_ignored(sharded: Sharded) -> None:
    sharded("write", "--shard", "0/3")
    sharded("write", "--shard", "1/3")
    sharded("crash", "--shard", "2/3")
    (sharded.run / "shards" / "preprocess" / "1-of-3" / "pages" / "1.jpg").write_bytes(b"touched")
    status = sharded.lorry("entrypoints.lorry", "status")
    assert "preprocess 2 of 3 shards done" in status.output
    code, lines = sharded("write")
    assert code == 0
    assert "preprocess: ignores shards 1/3, 2/3, which are unfinished or have other inputs or another recipe" in lines
    decided = json.loads((sharded.run / "preprocess" / "manifest.json").read_text())["decisions"]
    assert [made["value"] for made in decided if made["what"] == "shards taken over"] == ["0/3"]
    status = sharded.lorry("entrypoints.lorry", "status")
    assert "shards" not in status.output.split("preprocess")[1].splitlines()[0]


def test_force_takes_nothing_over_even_when_it_is_killed_and_goes_on(sharded: Sharded) -> None:
    sharded("write", "--shard", "0/2")
    assert not any("shards" in line for line in sharded("write", "--force")[1])
    assert sharded("killed", "--force")[0] == -9
    assert not any("shards" in line for line in sharded("write")[1])


def test_a_shard_of_another_recipe_is_ignored(sharded: Sharded) -> None:
    sharded("write", "--shard", "0/2")
    sharded.recipe.write_text(sharded.recipe.read_text() + "seed: 7\n")
    assert "ignores shards" in sharded("write")[1][0]


def test_the_option_is_explained() -> None:
    import sys

    shown = subprocess.run(
        [sys.executable, "-m", "entrypoints.infer", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    ).stdout
    assert "--shard I/N" in shown
