"""What NVML tells of the cards, what it may refuse to tell, and a driver that it cannot talk to."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.hardware import probe as module
from stages.hardware.probe import Gpu, Holder, probe, process_user, read_cards
from tests.conftest import REPOSITORY
from tests.hardware.recorded import GIB, Box


def test_the_box_of_eight(box: Box) -> None:
    found = read_cards()
    assert (found.driver, found.problem, len(found.gpus)) == ("535.183.06", "", 8)
    used = [round((gpu.memory_total - gpu.memory_free) / GIB, 1) for gpu in found.gpus]
    assert used[:5] == [67.9, 7.5, 40.8, 24.5, 65.5]
    first = found.gpus[0]
    assert (str(first), first.capability, first.mig, first.lost) == ("GPU 0 (NVIDIA A800-SXM4-80GB)", (8, 0), False, "")
    assert [gpu.index for gpu in probe().gpus] == [*range(8)]


def test_who_holds_a_card_the_largest_first(box: Box) -> None:
    box.cards[2]["graphics_processes"] = [{"pid": 41988, "usedGpuMemory": 5}, {"pid": 999999, "usedGpuMemory": None}]
    box.save()
    large, small, unseen = read_cards().gpus[2].processes
    assert str(large) == "VLLM::EngineCor (chen, pid 41988)"
    assert str(small) == "python3 (alice, pid 43017)"
    assert large.memory == int(22.1 * GIB)
    assert str(unseen) == "pid 999999, not visible from here,"
    assert unseen == Holder(999999, "?", "?", None), "as inside a container, which sees its own processes only"


def test_a_real_process_is_named(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROC", Path("/proc"))
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        for _ in range(100):  # until it has become `sleep`
            if module._process_name(sleeper.pid) == "sleep":
                break
            time.sleep(0.02)
        box.cards[0]["compute_processes"] = [{"pid": sleeper.pid, "usedGpuMemory": 7}]
        box.save()
        (holder,) = read_cards().gpus[0].processes
        sleeper.kill()
    assert holder == Holder(sleeper.pid, "sleep", process_user(os.getpid()), 7)
    assert holder.user != "?"


def test_a_user_without_a_name_is_a_number(box: Box) -> None:
    (box.proc / "41120" / "status").write_text("Uid:\t987654\t0\t0\t0\n")
    assert read_cards().gpus[0].processes[0].user == "987654"


def test_a_manifest_does_not_change_with_the_neighbours(box: Box) -> None:
    before = read_cards().gpus[0].identity()
    box.free(*[1.0] * 8)
    box.cards[0]["compute_processes"] = []
    box.save()
    assert read_cards().gpus[0].identity() == before
    assert {"memory_free", "processes", "lost"} & set(before) == set()


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("nvmlDeviceGetMigMode", "NOT_SUPPORTED"),
        ("nvmlDeviceGetMigMode", "FUNCTION_NOT_FOUND"),
        ("nvmlDeviceGetGraphicsRunningProcesses", "NOT_SUPPORTED"),
        ("nvmlDeviceGetComputeRunningProcesses", "NO_PERMISSION"),
        ("nvmlDeviceGetComputeRunningProcesses", "UNKNOWN"),
    ],
)
def test_what_a_card_may_refuse_to_tell(box: Box, function: str, error: str) -> None:
    box.lose(0, error, function)
    gpu = read_cards().gpus[0]
    assert (gpu.mig, gpu.lost) == (False, "")
    assert gpu.memory_free > 0
    assert bool(gpu.processes) == ("Compute" not in function)


def test_memory_that_is_not_reported_is_not_free(box: Box) -> None:
    box.lose(0, "NOT_SUPPORTED", "nvmlDeviceGetMemoryInfo")
    gpu = read_cards().gpus[0]
    assert (gpu.memory_total, gpu.memory_free, gpu.lost) == (0, 0, "")


@pytest.mark.parametrize(
    ("function", "error", "says", "known"),
    [
        ("*", "GPU_IS_LOST", "GPU is lost", False),
        ("*", "UNKNOWN", "Unknown Error", False),
        ("nvmlDeviceGetMemoryInfo", "GPU_IS_LOST", "GPU is lost", True),
        ("nvmlDeviceGetMemoryInfo", "UNKNOWN", "Unknown Error", True),
        ("nvmlDeviceGetComputeRunningProcesses", "RESET_REQUIRED", "GPU requires restart", True),
    ],
)
def test_a_lost_card_is_shown_as_lost_and_never_as_free(
    box: Box, function: str, error: str, says: str, known: bool
) -> None:
    box.lose(3, error, function)
    gpu = read_cards().gpus[3]
    assert (gpu.lost, gpu.memory_free, gpu.memory_total, gpu.capability) == (says, 0, 0, (0, 0))
    assert (gpu.uuid == box.uuid(3)) is known
    assert str(gpu) == ("GPU 3 (NVIDIA A800-SXM4-80GB)" if known else "GPU 3")


def test_a_stage_does_not_count_a_lost_card(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.lose(3)
    assert [gpu.index for gpu in probe().gpus] == [0, 1, 2, 4, 5, 6, 7]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert [gpu.index for gpu in probe().gpus] == [4]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert probe().gpus == ()


def test_mig_mode_is_seen(box: Box) -> None:
    box.slice(1)
    assert [gpu.mig for gpu in read_cards().gpus[:3]] == [False, True, False]


# -- a driver that does not answer ---------------------------------------------------------------------------------


def broken(box: Box, error: str) -> str:
    box.recorded["init_error"] = error
    box.save()
    found = read_cards()
    assert (found.gpus, found.driver) == ((), "")
    assert "\n" not in found.problem
    assert probe().problem == found.problem, "a stage can tell it too"
    return found.problem


def test_a_driver_of_another_version_than_its_library_is_reported(box: Box) -> None:
    message = broken(box, "LIB_RM_VERSION_MISMATCH")
    assert "driver/library version mismatch" in message
    assert "reboot" in message and "rmmod" in message


def test_a_machine_without_a_driver_has_no_cards_and_no_problem(box: Box) -> None:
    assert broken(box, "LIBRARY_NOT_FOUND") == ""


def test_a_driver_that_is_not_loaded_is_reported_if_there_is_a_card(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = tmp_path / "bus"
    bus.mkdir()
    monkeypatch.setattr(module, "PCI_DEVICES", bus)
    assert broken(box, "DRIVER_NOT_LOADED") == "", "the library alone, as in an image"
    for name, vendor, kind in (("audio", "0x10de", "0x040300"), ("intel", "0x8086", "0x030000")):
        (bus / name).mkdir()
        (bus / name / "vendor").write_text(vendor + "\n")
        (bus / name / "class").write_text(kind + "\n")
    assert broken(box, "DRIVER_NOT_LOADED") == ""
    (bus / "audio" / "class").write_text("0x030200\n")
    assert "sudo modprobe nvidia" in broken(box, "DRIVER_NOT_LOADED")


def test_any_other_error_of_the_driver_is_reported(box: Box) -> None:
    assert "does not answer (Unknown Error)" in broken(box, "UNKNOWN")


# -- the stand-in and the real package -----------------------------------------------------------------------------


def test_the_stand_in_plays_in_a_process_of_its_own(box: Box) -> None:
    program = "from stages.hardware.probe import probe; print(len(probe().gpus), probe().gpus[0].driver)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, **box.variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "8 535.183.06\n"


def test_the_stand_in_replaces_only_what_the_real_package_has(box: Box) -> None:
    import pynvml

    own = {name for name in vars(pynvml) if name.startswith("nvml") and getattr(vars(pynvml)[name], "__module__", "")}
    assert own <= set(vars(pynvml._pynvml))
    assert pynvml.NVMLError_GpuIsLost is pynvml._pynvml.NVMLError_GpuIsLost


def test_the_real_driver_is_read() -> None:
    """On a machine with cards; one without has none, and nothing to complain of."""
    found = read_cards()
    assert found.problem == ""
    assert bool(found.gpus) == bool(found.driver)
    for gpu in found.gpus:
        assert (gpu.lost, gpu.uuid[:4]) == ("", "GPU-")
        assert 0 < gpu.memory_free <= gpu.memory_total
        assert gpu.capability >= (3, 0)


def test_probing_is_quick(box: Box) -> None:
    began = time.perf_counter()
    for _ in range(20):
        probe()
    assert (time.perf_counter() - began) / 20 < 0.05


def test_a_card_without_extras_is_as_it_was() -> None:
    gpu = Gpu(0, "GPU-0", "a card", (8, 0), 2, 1, "580")
    assert (gpu.processes, gpu.mig, gpu.lost) == ((), False, "")
