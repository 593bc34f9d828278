"""What happens around a stage's work: skip, force, stop, kill, crash, and two at once."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import Exit, UsageError
from stages.contract.files import read_jsonl
from stages.contract.run import Run
from stages.contract.stop import STOPS, begin_child
from stages.host.runner import run_stage, write_recipe
from stages.host.status import status_lines
from tests.conftest import Finished, Lorry
from tests.contract.some_stage import STEPS

MODULE = "tests.contract.some_stage"


class Runner:
    """Runs `some_stage` in processes of its own."""

    def __init__(self, lorry: Lorry, recipe: Path) -> None:
        self.lorry, self.recipe = lorry, str(recipe)
        self.folder = lorry.runs / "r" / "preprocess"

    def __call__(self, work: str, *options: str) -> Finished:
        return self.lorry(MODULE, work, self.recipe, *options)

    def start(self, work: str, **options: Any) -> subprocess.Popen[str]:
        return self.lorry.start(MODULE, work, self.recipe, **options)

    def events(self) -> list[dict[str, object]]:
        return read_jsonl(self.folder / "events.jsonl")

    def wait_for_records(self, count: int) -> None:
        path = self.folder / "records.jsonl"
        deadline = time.monotonic() + 30
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert time.monotonic() < deadline, "it does not begin"
            time.sleep(0.01)


@pytest.fixture
def stage(small_mounts: Lorry, recipe_file: Path) -> Runner:
    return Runner(small_mounts, recipe_file)


def wait_until_waiting(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "preprocess: waiting\n"


# -- done, forced --------------------------------------------------------------------------------------------------


def test_done_and_unchanged_is_skipped_in_one_line(stage: Runner) -> None:
    first = stage("write")
    assert (first.code, first.lines[-1]) == (0, "preprocess: done in 0 s, 1 skipped")
    written = (stage.folder / "manifest.json").read_bytes()
    again = stage("write")
    assert (again.code, again.lines) == (0, ["preprocess: up to date"])
    assert (stage.folder / "manifest.json").read_bytes() == written


def test_force_does_it_again_from_nothing(stage: Runner) -> None:
    stage("count")
    first = read_jsonl(stage.folder / "records.jsonl")
    forced = stage("count", "--force")
    assert forced.code == 0
    second = read_jsonl(stage.folder / "records.jsonl")
    assert len(second) == STEPS
    assert {record["process"] for record in first}.isdisjoint(record["process"] for record in second)


# -- stopped, killed -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hang_up")
@pytest.mark.parametrize("number", STOPS)
def test_a_stop_in_the_middle_saves_and_exits_75_and_the_next_start_goes_on(stage: Runner, number: int) -> None:
    process = stage.start("count")
    stage.wait_for_records(3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    last = output.strip().splitlines()[-1]
    name = signal.Signals(number).name
    assert last == f"preprocess: stopped by {name} after saving finished work; run the same command again"
    before = read_jsonl(stage.folder / "records.jsonl")
    assert 3 <= len(before) < STEPS
    assert not (stage.folder / "manifest.json").exists()

    assert stage("count").code == 0
    after = read_jsonl(stage.folder / "records.jsonl")
    assert after[: len(before)] == before, "finished records are not made again"
    assert [record["step"] for record in after] == list(range(STEPS))
    manifest = json.loads((stage.folder / "manifest.json").read_text())
    assert len(manifest["starts"]) == 2
    assert manifest["outputs"]["records.jsonl"]["records"] == STEPS


def test_a_second_ctrl_c_does_not_wait_for_the_safe_point(stage: Runner) -> None:
    process = stage.start("deaf")
    wait_until_waiting(process)
    assert process.stdout is not None
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == (
        "preprocess: saves what is in progress, then stops (SIGINT); press Ctrl-C again to stop at once\n"
    )
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 75
    assert output == "preprocess: stopped by SIGINT after saving finished work; run the same command again\n"


@pytest.mark.usefixtures("hang_up")
@pytest.mark.parametrize("number", STOPS)
def test_a_stop_does_not_wait_where_nothing_is_to_be_saved(stage: Runner, number: int) -> None:
    process = stage.start("load")
    wait_until_waiting(process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    name = signal.Signals(number).name
    assert (process.returncode, output) == (
        75,
        f"preprocess: stopped by {name} after saving finished work; run the same command again\n",
    )


def test_a_hang_up_that_nohup_ignores_stays_ignored(stage: Runner) -> None:
    process = stage.start("count", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    stage.wait_for_records(3)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output


@pytest.mark.usefixtures("hang_up")
def test_a_lost_terminal_does_not_keep_a_stage_from_saving(stage: Runner) -> None:
    """As when the SSH connection is lost: writing to the terminal fails, and SIGHUP comes."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, "count", stage.recipe], env=stage.lorry.environment, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    stage.wait_for_records(3)
    os.close(ours)
    stage.wait_for_records(5)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 75
    assert 5 <= len(read_jsonl(stage.folder / "records.jsonl")) < STEPS
    stopped = next(event for event in stage.events() if event["event"] == "stopped")
    assert stopped["error"] == "stopped by SIGHUP after saving finished work; run the same command again"


@pytest.mark.usefixtures("hang_up")
def test_a_stop_while_a_child_begins_is_not_lost() -> None:
    """Python's own handlers would end it with a traceback, or the default ones before it can say so."""
    program = """
import time
from stages.contract.stop import StopRequest
time.sleep(0.5)  # as if it imported something
stop = StopRequest(waits=lambda: True)
stop.install()
print(stop.signal.name)
"""
    for number in STOPS:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=partial(begin_child, os.getpid()),  # noqa: PLW1509 - no other thread runs here
        )
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        assert (process.returncode, output) == (0, f"{signal.Signals(number).name}\n")


def test_a_kill_leaves_no_manifest_and_the_next_start_goes_on(stage: Runner) -> None:
    process = stage.start("count")
    stage.wait_for_records(5)
    process.kill()
    process.communicate(timeout=10)
    assert not (stage.folder / "manifest.json").exists()
    before = read_jsonl(stage.folder / "records.jsonl")
    assert stage("count").code == 0
    assert read_jsonl(stage.folder / "records.jsonl")[: len(before)] == before


# -- errors --------------------------------------------------------------------------------------------------------


def test_a_crash_exits_1_and_leaves_the_traceback_in_the_log(stage: Runner) -> None:
    done = stage("crash")
    assert done.code == 1
    log = stage.folder / "log.txt"
    assert done.lines == [
        f"preprocess: failed: ZeroDivisionError: a bug in Lorry; report this bug, with the traceback in {log}"
    ]
    assert "Traceback" in log.read_text()
    assert "a library's last words" in log.read_text()
    assert "crashed" in [event["event"] for event in stage.events()]
    assert not (stage.folder / "manifest.json").exists()


@pytest.mark.parametrize(
    ("work", "code", "message"), [("unusable", 3, "x.jsonl: nothing in it"), ("out_of_memory", 4, "memory")]
)
def test_known_errors_are_one_line_with_their_code(stage: Runner, work: str, code: int, message: str) -> None:
    done = stage(work)
    assert done.code == code
    assert message in done.lines[-1]
    stopped = next(event for event in stage.events() if event["event"] == "stopped")
    assert stopped["exit_code"] == code
    assert "Traceback" not in done.output
    log = (stage.folder / "log.txt").read_text()
    assert "Traceback" in log and f"in {work}" in log


def test_the_first_reasons_of_refused_data_are_shown_and_the_log_has_all(stage: Runner) -> None:
    done = stage("unusable")
    log = stage.folder / "log.txt"
    assert done.lines == [
        *(f"preprocess: skipped x.jsonl:{number}: no question (found {number})" for number in (1, 2, 3)),
        f"preprocess: and 2 more; all are in {log}",
        "preprocess: x.jsonl: nothing in it",
    ]
    for number in range(1, 6):
        assert f"skipped x.jsonl:{number}: no question (found {number})\n" in log.read_text()


def test_a_refusal_before_the_work_has_its_traceback_in_the_log(stage: Runner) -> None:
    (stage.lorry.data / "few").rename(stage.lorry.data / "other")
    done = stage("write")
    assert (done.code, len(done.lines)) == (2, 1), done.output
    log = (stage.folder / "log.txt").read_text()
    assert log.startswith("Traceback") and "few: no such data folder" in log


def test_a_stop_leaves_no_traceback_in_the_log(stage: Runner) -> None:
    process = stage.start("count")
    stage.wait_for_records(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert (stage.folder / "log.txt").read_text().splitlines() == [
        "stopped by SIGTERM after saving finished work; run the same command again"
    ]


# -- two at once ---------------------------------------------------------------------------------------------------


def test_a_second_process_exits_75_and_names_the_first(stage: Runner) -> None:
    first = stage.start("wait")
    try:
        wait_until_waiting(first)
        second = stage("write")
        assert second.code == 75
        assert len(second.lines) == 1
        assert f"process {first.pid} on {os.uname().nodename} is running this stage" in second.output
        assert not (stage.folder / "samples").exists(), "the second must not touch the folder"
    finally:
        first.kill()
        first.communicate()
    assert stage("write").code == 0, "a dead process holds no lock"


def test_another_recipe_is_not_written_into_a_run_that_is_busy(stage: Runner, tmp_path: Path) -> None:
    first = stage.start("wait")
    try:
        wait_until_waiting(first)
        kept = stage.lorry.runs / "r" / "recipe.yaml"
        before = kept.read_text()
        other = tmp_path / "other.yaml"
        other.write_text(Path(stage.recipe).read_text() + "seed: 7\n")
        assert stage.lorry(MODULE, "write", str(other)).code == 75
        assert kept.read_text() == before
    finally:
        first.kill()
        first.communicate()


def test_of_many_started_at_once_one_runs(stage: Runner) -> None:
    processes = [stage.start("count") for _ in range(4)]
    codes = [(process.communicate(timeout=60), process.returncode)[1] for process in processes]
    assert sorted(set(codes)) in ([0], [0, 75])
    records = read_jsonl(stage.folder / "records.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS))
    assert len({record["process"] for record in records}) == 1


def test_status_shows_an_error_from_before_the_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UsageError("train.epochs 0: must be 1 or more; raise it")

    monkeypatch.setenv("LORRY_RUNS", str(run.roots.runs))
    write_recipe(run)
    assert run_stage(run, "train", lambda stage: None, check=refuse) == Exit.USAGE
    lines = list(status_lines(run.name))
    place = next(number for number, line in enumerate(lines) if line.startswith("  train      failed, exit code 2 ("))
    assert lines[place + 1].strip() == "train.epochs 0: must be 1 or more; raise it"
