"""`lorry launch` without an engine: what was asked for, local processes, and an engine that refuses."""

import hashlib
import json
import signal
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from entrypoints import containers, launch
from stages.contract.errors import DoesNotFitError, UsageError
from stages.hardware.probe import Gpu
from stages.hardware.targets import load_targets
from tests.conftest import Lorry
from tests.other_user import as_other_user, folder_for_all

NO_ENGINE = "unix:///nowhere/docker.sock"


def cards(*capabilities: tuple[int, int]) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(index, f"GPU-{index}", f"card of {major}.{minor}", (major, minor), 1, 1, "580")
        for index, (major, minor) in enumerate(capabilities)
    )


def test_an_exit_code_that_no_signal_has_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert containers.killed("train", 255 - 128) == 1
    assert capsys.readouterr().err == "train: ended with 255\n"


# -- GPUs and target -----------------------------------------------------------------------------------------------


def test_gpus_are_numbers_of_this_machine() -> None:
    assert launch.choose_gpus("0,2", cards(*[(8, 0)] * 3)) == (0, 2)
    assert launch.choose_gpus("3, 1", cards(*[(8, 0)] * 4)) == (3, 1)
    assert launch.choose_gpus(None, cards((8, 0))) == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0,7", "there is no GPU 7; this machine has: 0 card of 8.0; 1 card of 8.0"),
        ("0,0", "names a GPU twice"),
        ("0,,1", "not a list of GPU numbers such as 0,2; this machine has: 0 card of 8.0"),
        ("all", "not a list of GPU numbers"),
        ("-1", "not a list of GPU numbers"),
    ],
)
def test_gpus_that_are_not_there_are_refused_with_those_that_are(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        launch.choose_gpus(text, cards((8, 0), (8, 0)))
    assert told in str(caught.value)


def test_where_nvml_shows_no_card_any_number_may_be_one() -> None:
    assert launch.choose_gpus("6", ()) == (6,)
    with pytest.raises(UsageError, match="NVML shows no cards here: name their target"):
        launch.choose_target(None, (6,), ())
    assert launch.choose_target("a800", (6,), ()).name == "a800"


def test_the_target_is_that_of_the_chosen_cards() -> None:
    mixed = cards((7, 0), (8, 9))
    assert launch.choose_target(None, (1,), mixed).name == "rtx4090"
    assert launch.choose_target(None, (), ()).name == "cpu"
    assert launch.choose_target("v100-gptq", (0,), mixed).name == "v100-gptq"
    with pytest.raises(UsageError, match="choose GPUs of one kind"):
        launch.choose_target(None, (), mixed)


def test_the_cpu_takes_no_gpus() -> None:
    with pytest.raises(UsageError, match="target cpu takes no GPUs"):
        launch.choose_target("cpu", (0,), cards((8, 0)))


def test_a_variant_is_an_image_of_train_only() -> None:
    variant = load_targets()["v100-gptq"]
    names = [containers.image_name(stage, "1.2.3", variant) for stage in ("train", "infer")]
    assert names == ["lorry-train:1.2.3-v100-gptq", "lorry-infer:1.2.3-v100"]


@pytest.mark.parametrize(
    "info",
    [
        {"Runtimes": {"runc": {}, "nvidia": {}}},
        {"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]},
    ],
)
def test_an_engine_that_hands_gpus_on(info: dict[str, object]) -> None:
    containers._refuse_without_nvidia(info, load_targets()["a800"])


def test_an_engine_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DoesNotFitError, match=r"target a800 needs GPUs.*nvidia-container-toolkit"):
        containers._refuse_without_nvidia({"Runtimes": {"runc": {}}, "DiscoveredDevices": None}, load_targets()["a800"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--target", "a100"), "no target 'a100'; there are: cpu, v100"),
        (("--target", "a800", "--gpus", "1,1"), "GPUS=1,1: names a GPU twice"),
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
        f"no Docker engine answers at {address}: running as a local process",
        f"error: {lorry.runs}/gone/recipe.yaml: no such run; name a RECIPE to begin one",
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


@pytest.mark.parametrize("given", ["option", "environment"])
def test_gpus_reach_a_local_process_as_numbers(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    seen: list[tuple[str, list[str], dict[str, str]]] = []

    def run_process(stage: str, arguments: list[str], _stop: object, environment: dict[str, str]) -> int:
        seen.append((stage, arguments, environment))
        return 0

    monkeypatch.setattr(launch, "run_process", run_process)
    monkeypatch.setattr(launch, "installed_gpus", lambda: cards(*[(8, 0)] * 5))
    for name, value in (("DOCKER_HOST", NO_ENGINE), ("GPUS", "0,3"), ("TARGET", "a800")):
        monkeypatch.setenv(name, value if given == "environment" or name == "DOCKER_HOST" else "")
    options = ["--gpus", "0,3", "--target", "a800"] if given == "option" else []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        launch.launch(["train", "patent-qa", "--run", "r", "--force", *options], standalone_mode=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    recipe = str(containers.REPOSITORY / "recipes" / "patent-qa.yaml")
    assert [(stage, arguments) for stage, arguments, _ in seen] == [
        ("preprocess", [recipe, "--run", "r"]),
        ("train", [recipe, "--run", "r", "--force"]),
    ]
    environment = seen[-1][2]
    found = [environment[name] for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LORRY_TARGET")]
    assert found == ["0,3", "PCI_BUS_ID", "a800"]


def test_a_host_without_the_libraries_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LIBRARIES", {"train": ("click", "no_such_library")})
    with pytest.raises(UsageError, match=r"train needs no_such_library.*make setup.*or start Docker"):
        launch._processes(("train",), {}, (), None)


def test_a_stop_reaches_the_local_process(bare: Lorry, few: Path, recipe_file: Path) -> None:
    process = bare.start("entrypoints.lorry", "launch", "preprocess", str(recipe_file), "--run", "r")
    deadline = time.monotonic() + 60
    while not (bare.runs / "r" / "preprocess" / "events.jsonl").exists():
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "run the same command again" in output


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


def test_no_permission_on_the_socket_is_told_and_does_not_fall_back(lorry: Lorry, forbidden: str) -> None:
    environment = {**lorry.environment, "DOCKER_HOST": forbidden, "TARGET": "cpu", "GPUS": "", "HOME": "/tmp"}
    done = as_other_user(environment, "entrypoints.lorry", "launch", "train", "patent-qa")
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert f"no permission on the Docker engine's socket {forbidden}: join its group" in done.output


def test_an_address_that_is_none(lorry: Lorry) -> None:
    done = replace(lorry, extra={"DOCKER_HOST": "foo:bar"})("entrypoints.lorry", "launch", "eval", "--run", "r")
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert "the Docker engine at foo:bar cannot be used" in done.output


def test_the_docker_context_is_asked_where_docker_host_is_not_set(lorry: Lorry, tmp_path: Path) -> None:
    meta = tmp_path / "contexts" / "meta" / hashlib.sha256(b"rootless").hexdigest()
    meta.mkdir(parents=True)
    endpoint = {"docker": {"Host": "unix:///nowhere/rootless.sock", "SkipTLSVerify": False}}
    (meta / "meta.json").write_text(json.dumps({"Name": "rootless", "Metadata": {}, "Endpoints": endpoint}))
    (tmp_path / "config.json").write_text('{"currentContext": "rootless"}')
    extra = {"DOCKER_HOST": "", "DOCKER_CONFIG": str(tmp_path)}
    done = replace(lorry, extra=extra)("entrypoints.lorry", "launch", "eval", "--run", "r")
    assert done.lines[0] == "no Docker engine answers at unix:///nowhere/rootless.sock: running as a local process"
