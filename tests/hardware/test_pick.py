"""Which cards a job gets on a shared box: by name, and by `auto`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.contract.errors import DoesNotFitError, InterruptedRunError, UsageError
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import Run
from stages.contract.stop import StopRequest
from stages.hardware import targets
from stages.hardware.holds import Holds
from stages.hardware.pick import (
    Need,
    Pick,
    denied_cards,
    hold_named_cards,
    named_cards,
    parse_wish,
    pick_cards,
)
from stages.hardware.probe import Gpu, probe, read_cards
from stages.host.work import run_work
from tests.conftest import REPOSITORY
from tests.hardware.recorded import GIB, Box


def named(box: Box, text: str, deny: str | None = None) -> list[int]:
    gpus = read_cards().gpus
    return [gpu.index for gpu in named_cards(parse_wish(text), gpus, denied_cards(deny, gpus))]


def refused(box: Box, text: str, deny: str | None = None) -> str:
    with pytest.raises((UsageError, DoesNotFitError)) as caught:
        named(box, text, deny)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- by name -------------------------------------------------------------------------------------------------------


def test_cards_are_named_by_number_and_by_uuid(box: Box) -> None:
    assert named(box, "0,1,2,3,4") == [0, 1, 2, 3, 4]
    assert named(box, " 3, 1 ") == [3, 1]
    assert named(box, f"0,{box.uuid(2)}") == [0, 2]
    assert named(box, "GPU-2ac,gpu-C61B,4") == [2, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,8", "GPUS=0,8: no GPU 8; this machine has: 0 NVIDIA A800-SXM4-80GB; 1 NVIDIA"),
        ("0,0", "names GPU 0 (NVIDIA A800-SXM4-80GB) twice"),
        ("2,GPU-2ac", "names GPU 2 (NVIDIA A800-SXM4-80GB) twice"),
        ("0,,1", "has an empty element; write it as 0,2"),
        ("0,", "has an empty element"),
        ("-1", "'-1' is not a GPU's number or UUID, as in 0,2 or GPU-8f5e; this machine has: 0 NVIDIA"),
        ("all", "'all' is not a GPU's number or UUID"),
        ("²", "is not a GPU's number"),
        ("0 1", "'0 1' is not a GPU's number"),
        ("GPU-8f5e", "2 UUIDs begin with GPU-8f5e: 0 GPU-8f5e3c1a-"),
        ("GPU-0000", "no GPU's UUID begins with GPU-0000; this machine has: 0 GPU-8f5e3c1a"),
        ("MIG-41e9d2b6-8a05-4f7c-9d13-7c2f6e8b0a59", "is a MIG slice, and Lorry binds whole GPUs"),
        ("auto:0", "write 0,2 or auto, or auto:4 for exactly four GPUs"),
        ("auto:x", "write 0,2 or auto, or auto:4"),
        ("auto:", "write 0,2 or auto, or auto:4"),
        ("auto,1", "not a list of GPUs, nor auto"),
    ],
)
def test_a_text_that_is_no_list_of_gpus_is_refused_in_one_line(box: Box, text: str, message: str) -> None:
    assert message in refused(box, text)


def test_a_card_in_mig_mode_is_refused_with_what_to_do(box: Box) -> None:
    box.slice(1)
    message = refused(box, "0,1")
    assert "GPU 1 (NVIDIA A800-SXM4-80GB) is in MIG mode, and Lorry binds whole GPUs" in message
    assert "nvidia-smi -i 1 -mig 0" in message


@pytest.mark.parametrize("deny", ["5,6,7", " 5 , 6 ,7", "GPU-41e9,6,7"])
def test_a_denied_card_is_refused(box: Box, deny: str) -> None:
    assert named(box, "0,4", deny) == [0, 4]
    assert "GPU 5 (NVIDIA A800-SXM4-80GB) is denied by LORRY_GPU_DENY" in refused(box, "0,5", deny)


@pytest.mark.parametrize(
    ("deny", "message"),
    [
        ("5,8", "LORRY_GPU_DENY=5,8: no GPU 8"),
        ("5;6", "'5;6' is not a GPU's number"),
        ("5,,6", "'' is not a GPU's number"),
        ("GPU-8f5e", "2 UUIDs begin with GPU-8f5e"),
        ("GPU-1234", "no GPU's UUID begins with GPU-1234"),
        ("MIG-1", "MIG-1 is a MIG slice"),
    ],
)
def test_a_typing_error_in_the_deny_list_is_refused(box: Box, deny: str, message: str) -> None:
    assert message in refused(box, "0", deny)


def test_the_deny_list_may_name_a_card_that_no_longer_tells_its_uuid(box: Box) -> None:
    lost = box.uuid(6)
    box.lose(6)
    assert named(box, "0", f"5,{lost}") == [0]
    assert "no longer answers (NVML: GPU is lost); see `dmesg | grep Xid`" in refused(box, "6")


# -- a stage by itself, without a launcher ---------------------------------------------------------------------------

Start = Callable[..., list[str]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a stage that does nothing, train by default, and returns the lines that it prints."""

    def run(name: str = "train") -> list[str]:
        lines: list[str] = []
        monkeypatch.setitem(sys.modules, f"stages.{name}.stage", SimpleNamespace(work=lambda _stage: None))
        # its preprocess needs no GPU: the embedder is small
        recipe = load_recipe(REPOSITORY / "recipes" / "patent-qa.yaml", "tiny")
        job = Run("r", recipe, Roots(Path("data"), Path("models"), Path("runs")))
        stage = SimpleNamespace(name=name, run=job, events=SimpleNamespace(say=lines.append), stop=StopRequest())
        run_work(stage)  # type: ignore[arg-type]
        return lines

    return run


@pytest.mark.parametrize(
    ("deny", "visible", "left"),
    [
        ("5,6,7", None, "0,1,2,3,4"),
        ("5,6,7", "6,4,5,1", "4,1"),
        ("5,6,7", "1,2", "1,2"),
        ("GPU-2ac", "2,3", "3"),
        ("5", "GPU-41e9d2b6,GPU-2ac", "2"),
        ("GPU-41e9", "5,2", "2"),
        ("", "GPU-41e9d2b6", "5"),
        ("", "gpu-41E9D2B6, 3", "5,3"),
        ("", "4,-1,3", "4"),
        ("", "6", "6"),
        ("", None, None),
    ],
)
def test_a_stage_sees_no_denied_card(
    box: Box, monkeypatch: pytest.MonkeyPatch, start: Start, deny: str, visible: str | None, left: str | None
) -> None:
    monkeypatch.setenv("LORRY_GPU_DENY", deny)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert start() == []
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left
    if left is not None:
        assert ",".join(str(gpu.index) for gpu in probe().gpus) == left
    assert os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"


def test_where_all_are_denied_a_stage_does_not_go_on_for_hours_without(
    box: Box, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    box.keep(2)
    monkeypatch.setenv("LORRY_GPU_DENY", "0,1")
    with pytest.raises(DoesNotFitError, match=r"LORRY_GPU_DENY=0,1: denies every GPU here \(0 NVIDIA A800"):
        start()
    start("preprocess")
    assert os.environ.pop("CUDA_VISIBLE_DEVICES") == ""
    monkeypatch.setenv("LORRY_TARGET", "cpu")
    start()
    monkeypatch.setenv("LORRY_TARGET", "")
    monkeypatch.setenv("LORRY_GPU_DENY", "0,9")
    with pytest.raises(UsageError, match="no GPU 9"):
        start()
    box.keep(0)
    start()  # a machine without cards, where the variable is set for all


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        ("8", "CUDA_VISIBLE_DEVICES=8: no GPU 8; this machine has: 0 NVIDIA A800"),
        ("0,9,2", "CUDA_VISIBLE_DEVICES=0,9,2: no GPU 9"),
        ("0,0", r"names GPU 0 \(NVIDIA A800-SXM4-80GB\) twice, and CUDA then shows none"),
        ("5,GPU-41e9", r"names GPU 5 \(NVIDIA A800-SXM4-80GB\) twice"),
        ("GPU-8f5e", "2 UUIDs begin with GPU-8f5e: 0 GPU-8f5e3c1a-"),
        ("GPU-0000", "no GPU's UUID begins with GPU-0000"),
        ("NoDevFiles", "'NoDevFiles' is not a GPU's number or UUID"),
        ("1abc", "'1abc' is not a GPU's number or UUID"),
        ("0,,1", "'' is not a GPU's number or UUID"),
        (" ", "'' is not a GPU's number or UUID"),
        ("MIG-41e9d2b6-8a05-4f7c-9d13-7c2f6e8b0a59", "is a MIG slice, and Lorry binds whole GPUs"),
        ("MIG-GPU-41e9d2b6-8a05-4f7c-9d13-7c2f6e8b0a59/7/0", "is a MIG slice, and Lorry binds whole GPUs"),
        ("0,1", r"GPU 1 \(NVIDIA A800-SXM4-80GB\) is in MIG mode, and Lorry binds whole GPUs"),
    ],
)
@pytest.mark.parametrize("stage", ["train", "preprocess"])
def test_what_cuda_would_hide_is_refused_in_one_line(
    box: Box, monkeypatch: pytest.MonkeyPatch, visible: str, message: str, stage: str, start: Start
) -> None:
    box.slice(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UsageError, match=message) as caught:
        start(stage)
    assert "\n" not in str(caught.value)


def test_a_named_card_that_is_lost_or_not_there_does_not_end_on_the_cpu(
    box: Box, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    box.lose(3, function="nvmlDeviceGetMemoryInfo")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(DoesNotFitError, match=r"CUDA_VISIBLE_DEVICES=3: GPU 3 \(NVIDIA.*no longer answers"):
        start()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    box.keep(0)
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=0: names a GPU, but NVML shows none on this machine"):
        start()
    monkeypatch.setenv("LORRY_TARGET", "cpu")
    assert (start(), os.environ["CUDA_VISIBLE_DEVICES"]) == ([], "")


def test_a_list_that_leaves_no_card_is_reported(box: Box, monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    monkeypatch.setenv("LORRY_GPU_DENY", "5")
    for visible, lines in (("-1", 1), ("-1,0", 1), ("", 0), ("GPU-41e9", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = start("preprocess")
        assert found == [f"CUDA_VISIBLE_DEVICES={visible}: leaves no GPU, so this stage computes on the CPU"][:lines]
        assert (os.environ["CUDA_VISIBLE_DEVICES"], probe().gpus) == ("", ())


def test_a_card_in_mig_mode_is_left_out_as_auto_leaves_it_out(
    box: Box, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    box.keep(3)
    box.slice(1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.index for gpu in probe().gpus] == [0, 2]
    assert start() == ["GPU 1 (NVIDIA A800-SXM4-80GB) is left out: in MIG mode"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("LORRY_GPU_DENY", "0,2")
    none = r"Lorry may use none \(GPU 0 \(.*\): in LORRY_GPU_DENY; GPU 1 .*in MIG mode; .*-mig 0"
    with pytest.raises(DoesNotFitError, match=none):
        start()


def test_where_every_card_is_lost_no_stage_computes_on_the_cpu(box: Box, start: Start) -> None:
    box.keep(1)
    box.lose(0)
    with pytest.raises(DoesNotFitError, match=r"Lorry may use none \(GPU 0: no longer answers \(GPU is lost\)\)"):
        start()


def test_another_order_than_nvmls_is_refused_where_it_can_matter(
    box: Box, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    with pytest.raises(UsageError, match="CUDA_DEVICE_ORDER=FASTEST_FIRST: Lorry numbers GPUs as nvidia-smi does"):
        start()
    box.keep(1)
    assert (start(), os.environ["CUDA_DEVICE_ORDER"]) == ([], "PCI_BUS_ID")


@pytest.mark.parametrize("stage", ["preprocess", "train", "infer"])
def test_cuda_numbers_cards_as_nvml_does_in_every_stage_that_computes(box: Box, start: Start, stage: str) -> None:
    """On a mixed host the fastest card is CUDA's first, unless it is told otherwise."""
    start(stage)
    assert os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"


# -- auto ----------------------------------------------------------------------------------------------------------


def auto(box: Box, text: str = "auto", need: int | Need = 1, deny: str | None = "5,6,7", **more: object) -> Pick:
    gpus = read_cards().gpus
    need = need if isinstance(need, Need) else Need.per_gpu(need * GIB, most=16)
    return pick_cards(parse_wish(text), need, gpus, denied_cards(deny, gpus), Holds(), **more)  # type: ignore[arg-type]


def indexes(pick: Pick) -> list[int]:
    return [gpu.index for gpu in pick.cards]


def no_room(box: Box, text: str = "auto", need: int | Need = 1, deny: str | None = "5,6,7") -> str:
    with pytest.raises(DoesNotFitError) as caught:
        auto(box, text, need, deny)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_auto_takes_every_card_that_fits(box: Box) -> None:
    pick = auto(box, need=20)
    assert indexes(pick) == [1, 2, 3], "free are 12.1, 72.5, 39.2, 55.5 and 14.5 GiB; three are denied"
    assert pick.lines == (
        "GPU 1 (NVIDIA A800-SXM4-80GB): taken, 72.5 GiB free of 80.0, 20.0 asked for",
        "GPU 2 (NVIDIA A800-SXM4-80GB): taken, 39.2 GiB free of 80.0, 20.0 asked for",
        "GPU 3 (NVIDIA A800-SXM4-80GB): taken, 55.5 GiB free of 80.0, 20.0 asked for",
    )


def test_auto_with_a_number_takes_those_with_the_most_free_memory(box: Box) -> None:
    assert indexes(auto(box, "auto:2", need=20)) == [1, 3]


def test_equally_free_cards_are_taken_from_the_lowest_number_on(box: Box) -> None:
    box.free(*[40.0] * 8)
    assert indexes(auto(box, "auto:3", need=20, deny="0")) == [1, 2, 3]


def test_never_more_cards_than_the_job_can_use(box: Box) -> None:
    assert indexes(auto(box, need=Need.per_gpu(GIB, most=2))) == [1, 3]


def test_a_denied_card_is_never_taken_however_free(box: Box) -> None:
    box.free(*[70.0] * 8)
    assert indexes(auto(box, need=20)) == [0, 1, 2, 3, 4]


def test_more_cards_may_need_less_of_each(box: Box) -> None:
    sharded = Need(lambda number, _: 90 * GIB // number, lambda number, _: 90 * GIB // number, most=16)
    assert indexes(auto(box, need=sharded)) == [1, 2, 3], "45 of two, 30 of three, 22.5 of four, which only three have"
    assert "no 2 GPUs of one kind have 45.0 GiB" in no_room(box, need=sharded, deny="1,2,3,5,6,7")


def test_if_the_recipes_way_does_not_fit_the_leanest_is_taken_and_reported(box: Box) -> None:
    need = Need(lambda *_: 75 * GIB, lambda *_: 50 * GIB, most=16)
    pick = auto(box, "auto:2", need=need)
    assert indexes(pick) == [1, 3]
    assert (
        pick.lines[-1]
        == "some have less free than asked for; train reaches the same result with down to 50.0 GiB per GPU"
    )


def test_all_busy_says_what_is_in_the_way_on_every_card(box: Box) -> None:
    box.slice(4)
    box.lose(7)
    message = no_room(box, "auto:4", need=30, deny="5,6")
    assert message.startswith("GPUS=auto:4: no 4 GPUs of one kind have 30.0 GiB free: GPU 0: 12.1 GiB free of 80.0,")
    for words in (
        "GPU 0: 12.1 GiB free of 80.0, held by python (alice, pid 41120) 67.4;",
        "GPU 1: fits;",
        "GPU 4: in MIG mode;",
        "GPU 5: in LORRY_GPU_DENY;",
        "GPU 7: no longer answers (GPU is lost);",
        "wait, use fewer GPUs, or see `lorry plan`",
    ):
        assert words in message


def test_the_neighbours_are_named_on_a_full_card(box: Box) -> None:
    message = no_room(box, need=79, deny=None)
    assert "GPU 2: 39.2 GiB free of 80.0, held by VLLM::EngineCor (chen, pid 41988) 22.1, python3 (alice" in message


def test_cards_of_one_kind_only_and_the_kind_with_the_most_that_fit(box: Box) -> None:
    for index in (1, 3):
        box.cards[index]["cuda_compute_capability"] = [9, 0]
    box.free(*[50.0] * 8)
    assert indexes(auto(box, "auto:2", need=20)) == [0, 2]
    assert indexes(auto(box, "auto:2", need=20, deny="0,5,6,7")) == [1, 3], "two of each fit: the newer"
    assert "no 4 GPUs of one kind have 20.0 GiB" in no_room(box, "auto:4", need=20)


def test_cards_of_one_target_only(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 of 40 GB has the capability of an A800."""
    for index in (1, 3):
        box.cards[index]["name"] = "NVIDIA A100-SXM4-40GB"
    box.free(*[30.0] * 8)
    assert indexes(auto(box, need=20)) == [0, 1, 2, 3, 4], "both are of target a800, as long as there is no other"
    path = tmp_path / "targets.toml"
    text = targets.TARGETS_FILE.read_text(encoding="utf-8")
    own = '[a100-40]\ncapability = "8.0"\nmemory_gib = 40\ndtype = "bfloat16"\nquantisation = []\n'
    path.write_text(f'{text}\n{own}node_label = "NVIDIA-A100-SXM4-40GB"\n', encoding="utf-8")
    monkeypatch.setattr(targets.load_targets, "__defaults__", (path,))
    for deny, taken in (("5,6,7", [0, 2, 4]), ("0,2,5,6,7", [1, 3])):
        monkeypatch.setenv("LORRY_GPU_HOLDS", str(tmp_path / deny))  # not what the calls before hold
        assert indexes(auto(box, need=20, deny=deny)) == taken


def test_cards_older_than_the_target_are_not_taken(box: Box) -> None:
    box.cards[1]["cuda_compute_capability"] = [7, 0]
    box.save()
    assert indexes(auto(box, "auto:1", need=20, oldest=(8, 0))) == [3]


def test_a_machine_without_cards(box: Box) -> None:
    box.keep(0)
    assert "NVML shows no GPU on this machine" in no_room(box, deny=None)


# -- against other processes -----------------------------------------------------------------------------------------


def test_what_auto_took_is_not_taken_again(box: Box) -> None:
    first, second = Holds(), Holds()
    gpus = read_cards().gpus
    need = Need.per_gpu(20 * GIB, most=16)
    one = pick_cards(parse_wish("auto:2"), need, gpus, frozenset({5, 6, 7}), first)
    two = pick_cards(parse_wish("auto"), need, gpus, frozenset({5, 6, 7}), second)
    assert (indexes(one), indexes(two)) == ([1, 3], [2])
    second.close()
    message = no_room(box, "auto:2", need=20)
    assert "GPU 1: held by lorry, pid" in message and "GPU 2: fits" in message
    first.close()
    assert indexes(auto(box, "auto:2", need=20)) == [1, 3]


RACER = """
import sys
from stages.hardware.holds import Holds
from stages.hardware.pick import Need, denied_cards, parse_wish, pick_cards
from stages.hardware.probe import read_cards
gpus = read_cards().gpus
pick = pick_cards(parse_wish("auto:2"), Need.per_gpu(10 * 2**30), gpus, denied_cards("5,6,7", gpus), Holds())
print(*(gpu.index for gpu in pick.cards), flush=True)
sys.stdin.read()
"""


def test_processes_that_pick_at_once_share_the_box_out(box: Box) -> None:
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", RACER],
            cwd=REPOSITORY,
            env={**os.environ, **box.variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    got = [process.stdout.readline().split() for process in racing if process.stdout]
    errors = [process.communicate()[1] for process in racing]
    assert sorted(got) == [[], ["1", "3"], ["2", "4"]], errors
    (refusal,) = [error for error in errors if error]
    assert "GPU 0: fits" in refusal and refusal.count("held by lorry, pid") == 4


def test_a_refusal_holds_nothing(box: Box) -> None:
    holds, gpus = Holds(), read_cards().gpus
    with pytest.raises(DoesNotFitError):
        pick_cards(parse_wish("auto:8"), Need.per_gpu(GIB, 8), gpus, frozenset(), holds, (9, 9))
    with pytest.raises(DoesNotFitError):
        pick_cards(parse_wish("auto:8"), Need.per_gpu(70 * GIB, 8), gpus, frozenset(), holds)
    assert indexes(auto(box, "auto:1", need=70)) == [1]


def test_two_jobs_may_be_put_on_one_card_by_name_but_auto_takes_another(box: Box) -> None:
    gpus, holds = read_cards().gpus, [Holds(), Holds()]
    for one in holds:
        hold_named_cards((gpus[1],), "GPUS=1", one)
    assert indexes(auto(box, "auto:1", need=20)) == [3]


def test_a_card_that_auto_holds_is_refused_by_name(box: Box) -> None:
    gpu: Gpu = auto(box, "auto:1", need=20).cards[0]
    with pytest.raises(
        InterruptedRunError, match=r"GPUS=1: GPU 1 \(NVIDIA.*held by lorry, pid \d+ of \w+, whose GPUS="
    ):
        hold_named_cards((gpu,), "GPUS=1", Holds())
