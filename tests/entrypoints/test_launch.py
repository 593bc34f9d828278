"""`lorry launch` without a Docker engine: local processes, the choice of GPUs, and an engine that refuses."""

import hashlib
import json
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from entrypoints.launch import launch
from stages.contract.stop import STOPS
from stages.hardware.holds import Holds
from stages.hardware.targets import Target
from stages.host import containers, launching, needs, processes
from stages.host.cards import CardChoice, job_need
from stages.host.needs import STAGES
from stages.host.outcome import Outcome
from tests.conftest import Lorry
from tests.hardware.recorded import Box
from tests.other_user import folder_for_all, run_as_other_user

NO_ENGINE = "unix:///nowhere/docker.sock"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--target", "a100"), "target 'a100': no such target; known targets: cpu, v100"),
        (("patent-qa", "--target", "a800", "--gpus", "1,1"), "GPUS=1,1: names a GPU twice"),
        (("--target", "a800", "--gpus", "0,,1"), "GPUS=0,,1: has an empty element"),
        (
            ("patent-qa", "--gpus", "auto:-2"),
            "GPUS=auto:-2: not a list of GPUs, nor auto; write 0,2 or auto",
        ),
        (("no-such-recipe",), "no such recipe file, and no such name"),
    ],
)
def test_wrong_use_is_one_line(lorry: Lorry, arguments: tuple[str, ...], told: str) -> None:
    done = replace(lorry, extra={"DOCKER_HOST": NO_ENGINE})("entrypoints.lorry", "launch", "train", *arguments)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert told in done.output


# -- no engine: local processes ------------------------------------------------------------------------------------


@pytest.fixture
def bare(lorry: Lorry) -> Lorry:
    """The commands on a machine where no engine answers."""
    return replace(lorry, extra={"DOCKER_HOST": NO_ENGINE, "TARGET": "", "GPUS": ""})


@pytest.mark.parametrize("address", [NO_ENGINE, "tcp://127.0.0.1:9", "unix://{dead}"])
def test_without_an_engine_it_says_so_and_runs_here(lorry: Lorry, tmp_path: Path, address: str) -> None:
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as listener:  # bound and gone: what a killed engine leaves
        listener.bind(str(dead))
    address = address.format(dead=dead)
    done = replace(lorry, extra={"DOCKER_HOST": address})("entrypoints.lorry", "launch", "train", "--run", "gone")
    assert done.lines == [
        f"no Docker engine answers at {address}; running as a local process",
        f"error: {lorry.runs}/gone/recipe.yaml: no such run; name a RECIPE to start one",
    ]
    assert done.code == 2


def test_options_and_exit_code_pass_through(bare: Lorry, few: Path, recipe_file: Path) -> None:
    (few / "questions.jsonl").write_text("")
    arguments = ("--run", "r", "--data", str(few), "--set", "seed=5")
    done = bare("entrypoints.lorry", "launch", "eval", str(recipe_file), *arguments)
    assert done.code == 3, done.output
    assert "preprocess: " in done.lines[-1], "the first stage ends it"
    kept = (bare.runs / "r" / "recipe.yaml").read_text()
    assert "seed: 5" in kept
    assert str(few) in kept


def test_earlier_stages_run_first_but_not_for_a_shard(bare: Lorry, recipe_file: Path, few: Path) -> None:
    done = bare("entrypoints.lorry", "launch", "train", str(recipe_file), "--run", "r", "--shard", "0/2")
    assert done.code == 2
    assert "train needs preprocess, which is not done" in done.output


@dataclass
class Launched:
    """What a launch did, in this process, with the stages replaced."""

    code: int
    seen: list[tuple[str, list[str], dict[str, str]]]
    output: str

    @property
    def visible(self) -> list[tuple[str, str | None]]:
        return [(stage, environment.get("CUDA_VISIBLE_DEVICES")) for stage, _, environment in self.seen]


Launch = Callable[..., Launched]


@pytest.fixture
def local(
    box: Box, lorry: Lorry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Launch]:
    """Launches local processes on the box of eight cards, but for the processes: `end` is what a stage does."""
    for name, value in {"DOCKER_HOST": NO_ENGINE, "LORRY_DATA": lorry.data, "LORRY_RUNS": lorry.runs}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LORRY_MODELS", str(lorry.models))
    monkeypatch.setattr(needs, "LIBRARIES", dict.fromkeys(STAGES, ()))
    monkeypatch.setattr(launching, "refuse_mistakes", lambda *_, **__: None)  # there are neither data nor models
    before = {number: signal.getsignal(number) for number in STOPS}

    def run(*arguments: str, end: Callable[[str], int] = lambda _: 0) -> Launched:
        seen: list[tuple[str, list[str], dict[str, str]]] = []

        def run_process(stage: str, arguments: list[str], _stop: object, environment: dict[str, str]) -> Outcome:
            seen.append((stage, arguments, dict(environment)))
            return Outcome(end(stage))

        monkeypatch.setattr(processes, "run_process", run_process)
        code = 0
        try:
            launch([*arguments], standalone_mode=False)
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Launched(code, seen, captured.out + captured.err)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("given", ["option", "environment"])
def test_gpus_reach_a_local_process_as_numbers(
    box: Box, local: Launch, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    gpus = f"0,{box.uuid(3)}"
    if given == "environment":
        monkeypatch.setenv("GPUS", gpus)
        monkeypatch.setenv("TARGET", "a800")
    options = ["--gpus", gpus, "--target", "a800"] if given == "option" else []
    done = local("train", "patent-qa", "--run", "r", "--force", *options)
    recipe = str(containers.REPOSITORY / "recipes" / "patent-qa.yaml")
    assert [(stage, arguments) for stage, arguments, _ in done.seen] == [
        ("preprocess", [recipe, "--run", "r"]),
        ("train", [recipe, "--run", "r", "--force"]),
    ]
    environment = done.seen[-1][2]
    found = [environment[name] for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LORRY_TARGET")]
    assert found == ["0,3", "PCI_BUS_ID", "a800"]


def test_a_list_stays_a_list_for_infer(local: Launch) -> None:
    assert local("infer", "patent-qa", "--gpus", "0,3").visible == [
        (s, "0,3") for s in ("preprocess", "train", "infer")
    ]


# -- auto ----------------------------------------------------------------------------------------------------------


def small(local: Launch, stage: str, *arguments: str, **options: Any) -> Launched:
    """A launch of the tiny model, which fits on a card with 10 GiB free, and of no document."""
    return local(stage, "patent-qa", "--profile", "tiny", "--run", "r", *arguments, **options)


def test_auto_takes_what_fits_says_so_and_infer_sees_the_first_alone(
    box: Box, local: Launch, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_GPU_DENY", "5,6,7")
    done = small(local, "infer", "--gpus", "auto:3")
    assert done.visible == [("preprocess", "1,2,3"), ("train", "1,2,3"), ("infer", "1")], done.output
    taken = [line for line in done.output.splitlines() if ": taken, " in line]
    assert [line.partition(":")[0] for line in taken] == [f"GPU {n} (NVIDIA A800-SXM4-80GB)" for n in (1, 2, 3)]


def test_auto_takes_no_more_cards_than_the_effective_batch(
    box: Box, local: Launch, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_GPU_DENY", "5,6,7")
    assert small(local, "train", "--gpus", "auto").visible[-1] == ("train", "0,1,2,3,4")
    done = small(local, "train", "--gpus", "auto", "--set", "train.effective_batch=2")
    assert done.visible[-1] == ("train", "1,3"), done.output


def test_auto_takes_any_number_of_cards_up_to_the_smaller_effective_batch(
    box: Box, local: Launch, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_GPU_DENY", "5,6,7")
    sixteen = ("--set", "train.effective_batch=16")
    assert small(local, "train", "--gpus", "auto", *sixteen).visible[-1] == ("train", "0,1,2,3,4"), "5 do not divide 16"
    both = ("--set", "train.connector={effective_batch: 3}")
    assert small(local, "train", "--gpus", "auto", *sixteen, *both).visible[-1] == ("train", "1,2,3")
    assert small(local, "train", "--gpus", "auto:3", *sixteen).visible[-1] == ("train", "1,2,3")


def test_auto_takes_cards_that_only_a_leaner_way_fits_on(
    box: Box, local: Launch, lorry: Lorry, language_model: Path
) -> None:
    recipe = {"recipe": "patent-qa", "profile": "tiny", "data": None, "overrides": (), "run_name": "r"}
    need = job_need(("train",), recipe)
    asked, least = need.asked(2, (8, 0)), need.least(2, (8, 0))
    assert least < asked
    box.free(*[(asked + least) / 2 / 2**30] * 8)
    done = small(local, "train", "--gpus", "auto:2")
    assert done.visible[-1] == ("train", "0,1"), done.output
    assert "some have less free than asked for; train reaches the same result with down to" in done.output
    box.free(*[(least - 1) / 2**30] * 8)
    assert small(local, "train", "--gpus", "auto:2").code == 4


@pytest.mark.parametrize("stage", ["preprocess", "eval"])
def test_auto_picks_nothing_for_stages_without_a_card(box: Box, local: Launch, stage: str) -> None:
    done = small(local, stage, "--gpus", "auto:4", "--shard", "0/2")
    assert done.visible == [(stage, "")]
    assert "taken" not in done.output
    assert not box.holds.exists()


def test_auto_for_infer_alone_takes_one_card(box: Box, local: Launch, language_model: Path) -> None:
    done = small(local, "infer", "--gpus", "auto", "--shard", "0/2")
    assert done.visible == [("infer", "1")], done.output
    assert "GPU 1 (NVIDIA A800-SXM4-80GB): taken, 72.5 GiB free of 80.0, 2.3 asked for" in done.output


def test_infer_takes_one_card_of_as_many_as_it_is_given(box: Box, local: Launch, language_model: Path) -> None:
    done = small(local, "infer", "--gpus", "auto:4", "--shard", "0/2")
    assert done.visible == [("infer", "1")], done.output
    assert "GPUS=auto:4: takes one GPU, as infer computes on one" in done.output


def test_cards_are_let_go_once_no_later_stage_computes_on_them(box: Box, local: Launch, language_model: Path) -> None:
    held: list[list[int]] = []

    def end(_: str) -> int:
        held.append([index for index in range(8) if Holds().holders(box.uuid(index))])
        return 0

    assert small(local, "eval", "--gpus", "auto:3", end=end).code == 0
    assert held == [[1, 2, 3], [1, 2, 3], [1], []], "while preprocess, train, infer and eval run"


def test_auto_where_all_are_busy_is_one_line_and_exit_4(box: Box, local: Launch, language_model: Path) -> None:
    box.free(*[0.5] * 8)
    done = small(local, "infer", "--gpus", "auto", "--shard", "0/2")
    assert (done.code, done.seen, len(done.output.splitlines())) == (4, [], 1)
    assert (
        "error: GPUS=auto: no GPU has 2.3 GiB free: GPU 0: 0.5 GiB free of 80.0, held by python (alice" in done.output
    )


def test_auto_without_the_model_says_so(box: Box, local: Launch) -> None:
    done = local("infer", "patent-qa", "--set", "model.path=not-there", "--gpus", "auto", "--shard", "0/2")
    assert (done.code, len(done.output.splitlines())) == (2, 1)
    assert "not-there: no such model folder; set model.path to a folder below LORRY_MODELS" in done.output


def test_two_launches_do_not_get_the_same_card(box: Box, local: Launch, language_model: Path) -> None:
    within: list[Launched] = []

    def end(_: str) -> int:  # while the first one runs
        within.append(small(local, "infer", "--gpus", "auto", "--shard", "1/2"))
        return 0

    small(local, "infer", "--gpus", "auto", "--shard", "0/2", end=end)
    assert within[0].visible == [("infer", "3")]


def test_a_card_that_an_auto_launch_has_is_refused_by_name(box: Box, local: Launch, language_model: Path) -> None:
    within: list[Launched] = []

    def end(_: str) -> int:
        within.append(local("infer", "patent-qa", "--gpus", "0,1"))
        return 0

    small(local, "infer", "--gpus", "auto", "--shard", "0/2", end=end)
    assert (within[0].code, within[0].seen) == (75, [])
    assert f"GPUS=0,1: GPU 1 (NVIDIA A800-SXM4-80GB) is held by lorry, pid {os.getpid()} of " in within[0].output


@pytest.mark.parametrize("gpus", ["0", "auto"])
def test_holds_that_cannot_be_kept_are_one_line(
    box: Box, local: Launch, language_model: Path, monkeypatch: pytest.MonkeyPatch, gpus: str
) -> None:
    box.holds.write_text("in the way")
    done = small(local, "infer", "--gpus", gpus, "--shard", "0/2")
    assert (done.code, done.seen, len(done.output.splitlines())) == (2, [], 1)
    assert f"{box.holds}/choosing: cannot hold a GPU with this file (Not a directory)" in done.output


def test_what_is_done_is_not_started_and_takes_no_card(
    box: Box, lorry: Lorry, few: Path, recipe_file: Path, local: Launch, embedder: Path
) -> None:
    done = replace(lorry, extra={"LORRY_TARGET": "cpu"}).preprocess(str(recipe_file), "--run", "r")
    assert done.code == 0, done.output
    again = local("preprocess", str(recipe_file), "--run", "r", "--gpus", "auto")
    assert (again.code, again.seen, again.output) == (0, [], "preprocess: up to date\n")
    forced = local("preprocess", str(recipe_file), "--run", "r", "--gpus", "auto", "--force")
    assert forced.visible == [("preprocess", "")]


# -- an engine -----------------------------------------------------------------------------------------------------


def test_containers_get_uuids_and_an_old_driver_is_reported_before(
    box: Box, local: Launch, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[tuple[str, list[str]]] = []
    computing: list[tuple[str, ...]] = []

    class Engine:
        def version(self) -> dict[str, str]:
            return {"Version": "28"}

    def container_runner(_e: object, stages: tuple[str, ...], _o: object, choice: CardChoice, target: Target) -> Any:
        devices.extend((stage, choice.devices(stage)) for stage in stages)
        computing.append(choice.computing)
        return (lambda _stage, _more: Outcome(0)), f"lorry-x-{target.name}"

    monkeypatch.setattr(launching, "find_engine", lambda: (Engine(), "unix:///x"))
    monkeypatch.setattr(launching, "container_runner", container_runner)
    done = small(local, "infer", "--gpus", "2,GPU-c6")
    assert devices == [(stage, [box.uuid(2), box.uuid(3)]) for stage in ("preprocess", "train", "infer")]
    assert "Docker engine 28 at unix:///x: running lorry-x-a800 with GPUs 2,3" in done.output
    assert computing == [("train", "infer")], "a small embedder of texts needs none"
    local("preprocess", "patent-qa", "--gpus", "2")
    assert computing[-1] == ("preprocess",), "GME and the classifier need one"
    box.recorded["driver_version"] = "515.105.01"
    box.save()
    refused = small(local, "infer", "--gpus", "0")
    assert (refused.code, len(refused.output.splitlines())) == (4, 1)
    assert "(cu128) needs NVIDIA driver 525 or newer, but this machine has 515.105.01" in refused.output


# -- a card that falls away ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "others"), [("2,3,4", "2,4"), ("3", "auto")])
def test_a_card_that_falls_off_the_bus_is_named(box: Box, local: Launch, gpus: str, others: str) -> None:
    def end(stage: str) -> int:
        if stage == "preprocess":
            return 0
        box.lose(3)
        return 1

    done = local("train", "patent-qa", "--gpus", gpus, end=end)
    assert done.code == 4
    told = (
        "error: train: GPU 3 (NVIDIA A800-SXM4-80GB) has fallen off the bus (NVML: GPU is lost); see `dmesg | grep Xid`"
    )
    assert told in done.output.splitlines()[-1]
    assert done.output.splitlines()[-1].endswith(f"then reset it or reboot; to run without it: GPUS={others}")


def test_a_card_that_nvml_no_longer_counts_is_named_too(box: Box, local: Launch) -> None:
    def end(_: str) -> int:
        box.keep(7)
        return 1

    done = local("infer", "patent-qa", "--gpus", "6,7", "--shard", "0/2", end=end)
    assert done.code == 4
    assert "GPU 7 (NVIDIA A800-SXM4-80GB) has fallen off the bus (NVML: no such GPU)" in done.output


def test_a_crash_with_all_cards_there_stays_a_crash(local: Launch) -> None:
    assert local("infer", "patent-qa", "--gpus", "6", "--shard", "0/2", end=lambda _: 1).code == 1


def test_a_driver_that_dies_with_the_stage_is_reported(box: Box, local: Launch) -> None:
    def end(_: str) -> int:
        box.recorded["init_error"] = "UNKNOWN"
        box.save()
        return 1

    done = local("infer", "patent-qa", "--gpus", "6", "--shard", "0/2", end=end)
    assert done.code == 1
    assert "infer: NVIDIA driver: does not answer (Unknown Error)" in done.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_local_process(bare: Lorry, few: Path, recipe_file: Path, number: int) -> None:
    process = bare.start("entrypoints.lorry", "launch", "preprocess", str(recipe_file), "--run", "r")
    deadline = time.monotonic() + 60
    while not (bare.runs / "r" / "preprocess" / "events.jsonl").exists():
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does: the whole group
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    name = signal.Signals(number).name
    last = output.splitlines()[-1]
    assert last == f"preprocess: stopped by {name} after saving finished work; run the same command again"
    assert "Traceback" not in output + (bare.runs / "r" / "preprocess" / "log.txt").read_text()


def test_a_stage_that_said_75_keeps_it_though_a_card_fell_away(box: Box, local: Launch) -> None:
    def end(stage: str) -> int:
        if stage == "preprocess":
            return 0
        box.lose(3)
        return 75

    done = local("train", "patent-qa", "--gpus", "2,3", end=end)
    assert done.code == 75
    assert "error: train: GPU 3 (NVIDIA A800-SXM4-80GB) has fallen off the bus" in done.output.splitlines()[-1]


def test_an_old_driver_is_reported_before_a_local_process_starts(
    box: Box, local: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.recorded["driver_version"] = "450.80.02"
    box.save()
    monkeypatch.setattr(launching, "installed_cuda", lambda: "12.8")
    done = local("train", "patent-qa", "--gpus", "1")
    assert (done.code, done.seen) == (4, [])
    told = "CUDA 12.8, which needs NVIDIA driver 525 or newer, but this machine has 450.80.02"
    assert told in done.output.splitlines()[-1]
    assert local("eval", "patent-qa", "--gpus", "1", "--shard", "0/2").code == 0, "which computes on no card"
    box.recorded["driver_version"] = "535.183.06"
    box.save()
    assert local("train", "patent-qa", "--gpus", "1").code == 0
    monkeypatch.setattr(launching, "installed_cuda", lambda: "13.0")
    assert "needs NVIDIA driver 580 or newer" in local("train", "patent-qa", "--gpus", "1").output


# -- an engine that refuses ----------------------------------------------------------------------------------------


@pytest.fixture
def forbidden() -> Iterator[str]:
    """The address of a socket that only root may use, which somebody listens on."""
    with folder_for_all() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = folder / "docker.sock"
        listener.bind(str(path))
        listener.listen()
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)
        yield f"unix://{path}"


def test_no_permission_on_the_socket_is_reported_and_does_not_fall_back(lorry: Lorry, forbidden: str) -> None:
    environment = {**lorry.environment, "DOCKER_HOST": forbidden, "TARGET": "cpu", "GPUS": "", "HOME": "/tmp"}
    done = run_as_other_user(environment, "entrypoints.lorry", "launch", "train", "patent-qa")
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert f"{forbidden}: no permission on this socket of the Docker engine; join its group" in done.output


def test_an_address_that_is_none(lorry: Lorry) -> None:
    done = replace(lorry, extra={"DOCKER_HOST": "foo:bar"})("entrypoints.lorry", "launch", "eval", "--run", "r")
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert "foo:bar: the Docker engine there cannot be used" in done.output


def test_the_docker_context_is_asked_where_docker_host_is_not_set(lorry: Lorry, tmp_path: Path) -> None:
    meta = tmp_path / "contexts" / "meta" / hashlib.sha256(b"rootless").hexdigest()
    meta.mkdir(parents=True)
    endpoint = {"docker": {"Host": "unix:///nowhere/rootless.sock", "SkipTLSVerify": False}}
    (meta / "meta.json").write_text(json.dumps({"Name": "rootless", "Metadata": {}, "Endpoints": endpoint}))
    (tmp_path / "config.json").write_text('{"currentContext": "rootless"}')
    extra = {"DOCKER_HOST": "", "DOCKER_CONFIG": str(tmp_path)}
    done = replace(lorry, extra=extra)("entrypoints.lorry", "launch", "eval", "--run", "r")
    assert done.lines[0] == "no Docker engine answers at unix:///nowhere/rootless.sock; running as a local process"
