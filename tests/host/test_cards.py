"""Which GPUs a launch gives its stages: named, GPU 0, or auto."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import DoesNotFitError, UsageError
from stages.hardware.holds import Holds
from stages.hardware.probe import read_cards
from stages.host.cards import CardChoice, choose_cards, choose_target, inference_bytes, job_need
from tests.hardware.recorded import Box
from tests.hardware.shapes import make_shape


@pytest.fixture
def holds(tmp_path: Path) -> Iterator[Holds]:
    found = Holds(tmp_path / "holds")
    yield found
    found.close()


def options(profile: str | None = None, recipe: str = "patent-qa", *overrides: str) -> dict[str, Any]:
    return {"recipe": recipe, "profile": profile, "data": None, "overrides": overrides, "run_name": "r"}


def choose(text: str | None, holds: Holds, stage: str = "train", target: str | None = None) -> CardChoice:
    return choose_cards(text, target, (stage,), options(), read_cards(), holds)


def test_cards_reach_containers_by_uuid_and_local_processes_by_number(box: Box, holds: Holds) -> None:
    chosen = choose(f"3,{box.uuid(1)}", holds)
    assert chosen.devices("train") == chosen.devices("infer") == [box.uuid(3), box.uuid(1)]
    assert chosen.visible_devices("train") == "3,1"


def test_an_order_in_which_the_numbers_would_be_other_cards_is_refused(
    box: Box, holds: Holds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    with pytest.raises(UsageError, match="CUDA_DEVICE_ORDER=FASTEST_FIRST: Lorry numbers GPUs as nvidia-smi does"):
        choose("0", holds)


def test_without_a_list_it_is_card_0_unless_that_is_denied(
    box: Box, holds: Holds, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(None, holds).visible_devices("train") == choose(" ", holds).visible_devices("train") == "0"
    monkeypatch.setenv("LORRY_GPU_DENY", "0,5")
    told = r"GPUS is not set \(default: 0\): GPU 0 \(NVIDIA.*is denied by LORRY_GPU_DENY"
    with pytest.raises(UsageError, match=told):
        choose(None, holds)
    assert choose(None, holds, "eval") == CardChoice(), "which takes no card"


def test_a_list_for_cuda_is_not_ignored_in_silence(box: Box, holds: Holds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    told = ("CUDA_VISIBLE_DEVICES=3: not read here; GPUS names the GPUs of a launch (default: 0)",)
    assert (choose(None, holds).lines, choose("1", holds).lines) == (told, ())


def test_the_machine_without_cards_needs_no_list(box: Box, holds: Holds) -> None:
    box.keep(0)
    assert choose(None, holds) == CardChoice()


def test_where_nvml_shows_no_card_any_may_be_one(box: Box, holds: Holds, monkeypatch: pytest.MonkeyPatch) -> None:
    box.keep(0)
    chosen = choose("6,GPU-8f5e", holds)
    assert chosen.devices("train") == ["6", "GPU-8f5e"]
    with pytest.raises(UsageError, match="NVML shows no GPUs here; set TARGET, to one of cpu, v100"):
        choose_target(None, chosen, ())
    assert choose_target("a800", chosen, ()).name == "a800"
    for text, told in (("1,1", "names a GPU twice"), ("-1", "'-1' is not a GPU's number"), ("MIG-1", "is a MIG slice")):
        with pytest.raises(UsageError, match=told):
            choose(text, holds)
    monkeypatch.setenv("LORRY_GPU_DENY", "5, 6")
    with pytest.raises(UsageError, match="GPU 6 is denied by LORRY_GPU_DENY; name others"):
        choose("6", holds)
    assert choose(None, holds, "train", "a800") == CardChoice(computing=("train",)), "Compose hands it card 0"
    monkeypatch.setenv("LORRY_GPU_DENY", "0")
    with pytest.raises(
        UsageError, match=r"GPUS is not set \(default: 0\): GPU 0 is denied by LORRY_GPU_DENY; name others"
    ):
        choose(None, holds, "train", "a800")


def test_the_target_is_that_of_the_chosen_cards(box: Box) -> None:
    for index, capability in enumerate(([7, 0], [8, 9])):
        box.cards[index]["cuda_compute_capability"] = capability
    box.keep(2)
    gpus = read_cards().gpus
    assert choose_target(None, CardChoice(gpus[1:]), gpus).name == "rtx4090"
    assert choose_target(None, CardChoice(), gpus).name == "v100", (
        "none is needed: the first says which images there are"
    )
    assert choose_target(None, CardChoice(), ()).name == "cpu"
    assert choose_target("v100-gptq", CardChoice(gpus[:1]), gpus).name == "v100-gptq"
    with pytest.raises(UsageError, match="choose GPUs of one kind"):
        choose_target(None, CardChoice(gpus), gpus)
    box.lose(0)
    assert choose_target(None, CardChoice(), read_cards().gpus).name == "rtx4090"


@pytest.mark.parametrize("text", ["0", "auto"])
def test_the_cpu_takes_no_gpus(box: Box, holds: Holds, text: str) -> None:
    with pytest.raises(UsageError, match="target cpu has no GPUs; leave GPUS out, or set another TARGET"):
        choose(text, holds, target="cpu")


def test_named_cards_are_held_only_where_a_stage_computes_on_them(box: Box, holds: Holds) -> None:
    choose("1", holds, "eval")
    assert holds.holders(box.uuid(1)) == []
    choose("1", holds, "infer")
    assert [lock.exclusive for lock in holds.holders(box.uuid(1))] == [False]


def test_a_driver_that_does_not_answer_is_not_a_machine_without_cards(box: Box, holds: Holds) -> None:
    box.recorded["init_error"] = "LIB_RM_VERSION_MISMATCH"
    box.save()
    for stage, target in (("train", None), ("train", "a800"), ("eval", None)):
        with pytest.raises(DoesNotFitError, match=r"driver/library version mismatch.*reboot.*or set TARGET=cpu"):
            choose(None, holds, stage, target)
    assert choose(None, holds, "train", "cpu") == choose(None, holds, "eval", "a800") == CardChoice()


def test_preprocess_gets_a_card_for_its_recipes_models(
    box: Box, holds: Holds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A 7B embedder of pictures and a 7B classifier: 17 GB of weights, a fifth more, and 2 GiB."""
    for name in ("gme-Qwen2-VL-7B-Instruct", "all-MiniLM-L6-v2", "Qwen2.5-VL-32B-Instruct"):
        make_shape(tmp_path / name, "Qwen2.5-0.5B" if name.startswith("all") else "Qwen2.5-7B")
    config = tmp_path / "gme-Qwen2-VL-7B-Instruct" / "config.json"
    config.write_text(config.read_text().replace('"qwen2"', '"qwen2_vl"'))
    monkeypatch.setenv("LORRY_MODELS", str(tmp_path))

    def chosen(text: str, **named: str) -> CardChoice:
        return choose_cards(text, None, ("preprocess",), options(**named), read_cards(), holds)

    assert chosen("1").computing == ("preprocess",)
    assert [lock.exclusive for lock in holds.holders(box.uuid(1))] == [False]
    assert chosen("2", profile="text").computing == ()
    assert holds.holders(box.uuid(2)) == []
    assert chosen("auto", profile="text") == CardChoice(auto=True)
    monkeypatch.setenv("LORRY_GPU_DENY", "5,6,7")
    taken = chosen("auto")
    assert [gpu.index for gpu in taken.cards] == [2, 3], "each embeds a share; 0 and 4 are busy, and 1 is held"
    assert all("19.0 asked for" in line for line in taken.lines), taken.lines


def test_auto_counts_with_the_larger_of_both_phases(language_model: Path, box: Box) -> None:
    def asked(*overrides: str) -> int:
        recipe = {"recipe": "patent-qa", "profile": "tiny", "data": None, "overrides": overrides, "run_name": "r"}
        return job_need(("train",), recipe).asked(1, (8, 0))

    alone = asked()
    small = "train.connector={effective_batch: 1, max_length: 64}"
    assert asked(small) == alone, "the second phase is the larger"
    assert asked("train.connector={effective_batch: 64, max_length: 65536}") > 1.5 * alone, "the first is"


def test_answering_needs_its_weights_and_a_fifth_more() -> None:
    assert inference_bytes(15_231_233_024) == pytest.approx(20.4e9, rel=0.01), "Qwen2.5-7B in half precision"
