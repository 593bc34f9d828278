"""The card decides by its compute capability."""

from pathlib import Path

import pytest

from stages.contract.errors import DoesNotFitError, UsageError
from stages.hardware.probe import Gpu, Machine, probe, visible_gpus
from stages.hardware.targets import (
    TARGETS_FILE,
    Target,
    load_targets,
    machine_target,
    refuse_4bit_twice,
    refuse_base_without_kernels,
    refuse_driver_too_old_for_cuda,
    working_target,
)

TARGETS = load_targets()
LOCKS = Path(__file__).parents[2] / "images" / "train"


def machine(*capabilities: tuple[int, int], name: str = "a card", driver: str = "580.65.06") -> Machine:
    gpus = [
        Gpu(index, f"GPU-{index}", name, capability, 24 << 30, 23 << 30, driver)
        for index, capability in enumerate(capabilities)
    ]
    return Machine(cpus=2, memory_bytes=8 << 30, gpus=tuple(gpus))


def test_the_targets_of_the_design_are_there() -> None:
    assert set(TARGETS) >= {"cpu", "v100", "a800", "rtx4090", "h100"}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_has_every_fact_that_its_images_need(name: str) -> None:
    target = TARGETS[name]
    assert target.dtype in ("float32", "float16", "bfloat16")
    assert all(isinstance(value, str) for value in target.environment.values())
    if name != "cpu":
        assert target.capability
        assert target.memory_gib
        assert target.cuda
        assert target.min_driver
        assert target.node_label


@pytest.mark.parametrize("name", TARGETS)
def test_deepspeed_and_4_bit_kernels_are_in_the_images_that_promise_them(name: str) -> None:
    target = TARGETS[name]
    locks = [LOCKS / f"{lock}{kind}.txt" for lock in (name, target.cuda or "cpu") for kind in ("", ".source")]
    own = locks[:2] if locks[0].is_file() else locks[2:]
    packages = "".join(path.read_text() for path in own if path.is_file())
    assert ("\ndeepspeed==" in f"\n{packages}") == target.deepspeed
    assert ("\nbitsandbytes==" in packages) == ("bitsandbytes" in target.quantisation)
    if name != "cpu":  # on a CPU GPTQ is the host's: requirements/gptq.txt
        kernels = any(f"\n{package}==" in f"\n{packages}" for package in ("gptqmodel", "auto-gptq"))
        assert kernels == ("gptq" in target.quantisation)


@pytest.mark.parametrize("name", TARGETS)
def test_targets_of_one_line_of_wheels_need_the_same_driver(name: str) -> None:
    line, driver = TARGETS[name].cuda, TARGETS[name].min_driver
    assert {target.min_driver for target in TARGETS.values() if target.cuda == line} == {driver}


def test_a_torch_of_another_line_needs_the_driver_of_its_own_cuda() -> None:
    for cuda, driver in (("12.4", "525.60.13"), ("13.0", "580.65.06"), ("11.8", "450.80.02")):
        refuse_driver_too_old_for_cuda(cuda, driver, TARGETS)
    for cuda, driver, least in (("12.4", "450.80.02", 525), ("13.2", "535.183.06", 580)):
        with pytest.raises(DoesNotFitError, match=f"CUDA {cuda}, which needs NVIDIA driver {least} or newer"):
            refuse_driver_too_old_for_cuda(cuda, driver, TARGETS)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.dtype == "bfloat16"])
def test_bf16_only_where_the_card_computes_in_it(name: str) -> None:
    """torch.cuda.is_bf16_supported() says yes on a V100, which only emulates it."""
    assert (TARGETS[name].capability or (0, 0)) >= (8, 0)


def test_a_base_is_refused_where_nothing_computes_with_it_and_never_put_in_4_bits_twice() -> None:
    model = Path("models/x")
    for quantisation, target in (
        ("gptq", "v100-gptq"),
        ("gptq", "v100"),
        ("gptq", "cpu"),
        ("awq", "a800"),
        (None, "cpu"),
    ):
        refuse_base_without_kernels(model, quantisation, TARGETS[target])
    for quantisation, target in (("awq", "v100"), ("fp8", "a800"), ("awq", "cpu")):
        with pytest.raises(DoesNotFitError, match=f"target {target} has no kernels for its {quantisation} weights"):
            refuse_base_without_kernels(model, quantisation, TARGETS[target])
    refuse_4bit_twice(model, None)
    with pytest.raises(UsageError, match=r"quantised already \(gptq\)"):
        refuse_4bit_twice(model, "gptq")


def test_kernels_that_a_v100_has_not_are_not_promised() -> None:
    assert not {"awq", "fp8"} & set(TARGETS["v100"].quantisation)
    assert "fp8" not in TARGETS["a800"].quantisation


@pytest.mark.parametrize(
    ("capability", "target"),
    [((7, 0), "v100"), ((8, 0), "a800"), ((8, 9), "rtx4090"), ((9, 0), "h100"), ((7, 5), "v100"), ((8, 6), "a800")],
)
def test_a_card_takes_the_newest_target_that_is_not_newer(capability: tuple[int, int], target: str) -> None:
    assert machine_target(machine(capability, capability), TARGETS).name == target


def test_a_card_newer_than_all_takes_the_newest_target() -> None:
    newest = max((t for t in TARGETS.values() if t.capability), key=lambda t: t.capability or (0, 0))
    assert machine_target(machine((99, 0)), TARGETS) == newest


def test_the_name_decides_nothing_between_capabilities() -> None:
    assert machine_target(machine((8, 0), name="Tesla V100-SXM2-32GB"), TARGETS).name == "a800"


L40S = """
[l40s]
capability = "8.9"
memory_gib = 48
cuda = "cu128"
dtype = "bfloat16"
quantisation = ["gptq"]
node_label = "NVIDIA-L40S"

[a100-40]
capability = "8.0"
memory_gib = 40
cuda = "cu128"
dtype = "bfloat16"
quantisation = ["gptq"]
node_label = "NVIDIA-A100-SXM4-40GB"
"""


@pytest.fixture(params=["first", "last"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Target]:
    """The targets with two more that share capabilities with others, at the file's beginning or end."""
    text = TARGETS_FILE.read_text(encoding="utf-8")
    path = tmp_path / "targets.toml"
    path.write_text(L40S + text if request.param == "first" else text + L40S, encoding="utf-8")
    return load_targets(path)


@pytest.mark.parametrize(
    ("name", "capability", "target"),
    [
        ("NVIDIA L40S", (8, 9), "l40s"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", (8, 9), "rtx4090"),
        ("NVIDIA GeForce RTX 4080", (8, 9), "rtx4090"),
        ("NVIDIA L40", (8, 9), "rtx4090"),  # as many words in common: the nearer memory, here 24 GiB
        ("NVIDIA A800-SXM4-80GB", (8, 0), "a800"),
        ("NVIDIA A800 80GB PCIe", (8, 0), "a800"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "a100-40"),
        ("NVIDIA A100-PCIE-40GB", (8, 0), "a100-40"),
        ("Tesla V100-SXM2-32GB", (7, 0), "v100"),
    ],
)
def test_of_targets_of_one_capability_the_product_decides_and_not_the_files_order(
    both: dict[str, Target], name: str, capability: tuple[int, int], target: str
) -> None:
    found = machine_target(machine(capability, capability, name=name), both)
    assert found.name == target
    assert ("NCCL_P2P_DISABLE" in found.environment) == (target == "rtx4090")


def test_cards_of_two_targets_are_refused(both: dict[str, Target]) -> None:
    gpus = [*machine((8, 9), name="NVIDIA L40S").gpus, *machine((8, 9), name="NVIDIA GeForce RTX 4090").gpus]
    with pytest.raises(UsageError, match=r"visible GPUs: differ in target \(l40s, rtx4090\); choose GPUs of one kind"):
        machine_target(Machine(2, 8 << 30, tuple(gpus)), both)


@pytest.mark.parametrize(
    ("image", "name", "works_as"),
    [
        ("l40s", "NVIDIA L40S", "l40s"),
        ("l40s", "NVIDIA GeForce RTX 4090", "rtx4090"),  # whose NCCL needs other settings
        ("rtx4090", "NVIDIA L40S", "l40s"),
        ("l40s", "NVIDIA L40", "l40s"),  # no target is that product: the user's choice
    ],
)
def test_an_image_for_another_product_gets_the_settings_of_the_card(
    both: dict[str, Target], monkeypatch: pytest.MonkeyPatch, image: str, name: str, works_as: str
) -> None:
    monkeypatch.setenv("LORRY_TARGET", image)
    found = working_target(machine((8, 9), name=name), both)
    assert (found.name, found.environment) == (works_as, both[works_as].environment)


def test_a_variants_image_keeps_its_wheels_and_gets_the_settings_of_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "targets.toml"
    own = '[v100-16]\ncapability = "7.0"\nmemory_gib = 16\ndtype = "float16"\n'
    own += 'quantisation = []\nenvironment = { NCCL_P2P_DISABLE = "1" }\nnode_label = "Tesla-V100-PCIE-16GB"\n'
    path.write_text(f"{own}{TARGETS_FILE.read_text(encoding='utf-8')}", encoding="utf-8")
    monkeypatch.setenv("LORRY_TARGET", "v100-gptq")
    for name, environment in (("Tesla V100-PCIE-16GB", {"NCCL_P2P_DISABLE": "1"}), ("Tesla V100-SXM2-32GB", {})):
        found = working_target(machine((7, 0), name=name), load_targets(path))
        assert (found.name, found.deepspeed, found.environment) == ("v100-gptq", False, environment)


def test_cards_of_different_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="visible GPUs: differ in compute capability"):
        machine_target(machine((8, 0), (8, 9)), TARGETS)


def test_a_card_too_old_is_refused_by_its_capability() -> None:
    with pytest.raises(UsageError, match=r"6\.1 is older"):
        machine_target(machine((6, 1)), TARGETS)


def test_no_card_is_the_cpu() -> None:
    target = machine_target(machine(), TARGETS)
    assert (target.name, target.capability, target.dtype) == ("cpu", None, "float32")


def test_a_variant_has_its_cards_facts_and_is_never_chosen_by_a_card() -> None:
    variant = TARGETS["v100-gptq"]
    assert (variant.variant_of, variant.capability, variant.dtype) == ("v100", (7, 0), "float16")
    assert variant.cuda != TARGETS["v100"].cuda
    assert machine_target(machine((7, 0)), TARGETS).name == "v100"


# -- an image and the cards that it finds --------------------------------------------------------------------------


def working(monkeypatch: pytest.MonkeyPatch, image: str, found: Machine) -> str:
    monkeypatch.setenv("LORRY_TARGET", image)
    return working_target(found, TARGETS).name


def test_outside_an_image_the_cards_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORRY_TARGET", raising=False)
    assert working_target(machine((8, 0)), TARGETS).name == "a800"
    assert working(monkeypatch, "", machine()) == "cpu"


@pytest.mark.parametrize(
    ("image", "capability", "works_as"),
    [
        ("a800", (8, 0), "a800"),
        ("a800", (9, 0), "h100"),  # the card's own precision and quantisation, whatever image it is
        ("v100", (8, 0), "a800"),
        ("v100-gptq", (7, 0), "v100-gptq"),
    ],
)
def test_an_image_works_on_its_card_and_newer_ones(
    monkeypatch: pytest.MonkeyPatch, image: str, capability: tuple[int, int], works_as: str
) -> None:
    assert working(monkeypatch, image, machine(capability)) == works_as


def test_the_cpu_image_needs_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert working(monkeypatch, "cpu", machine()) == "cpu"


def test_no_gpu_visible_says_how_to_hand_it_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        working(monkeypatch, "a800", machine())
    assert "LORRY_TARGET=a800: needs a GPU, but none is visible; give it one" in str(caught.value)
    for words in ("GPUS=0", "--gpus", "TARGET=cpu"):
        assert words in str(caught.value)


def test_no_gpu_visible_in_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_IMAGE", "lorry-train:0.1.0-a800")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    with pytest.raises(
        DoesNotFitError, match=r"none is visible; give the pod a limit of nvidia\.com/gpu, or use TARGET"
    ):
        working(monkeypatch, "a800", machine())


def test_a_card_older_than_the_image_gets_the_right_target(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DoesNotFitError,
        match=r"LORRY_TARGET=a800: needs compute capability 8\.0 or higher, but Tesla.* has 7\.0; .*TARGET=v100",
    ):
        working(monkeypatch, "a800", machine((7, 0), name="Tesla V100-SXM2-32GB"))


def test_a_driver_too_old_for_the_images_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DoesNotFitError, match=r"\(cu130\) needs NVIDIA driver 580 or newer.*has 535\.183\.01"):
        working(monkeypatch, "h100", machine((9, 0), driver="535.183.01"))
    assert working(monkeypatch, "a800", machine((8, 0), driver="535.183.01")) == "a800"


def test_an_unknown_target_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="target 'a100': no such target; known targets: cpu, v100"):
        working(monkeypatch, "a100", machine((8, 0)))


@pytest.mark.parametrize(
    ("setting", "left"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-1", [1]),
        ("1,9,2", [1]),
        ("-1", []),
        ("1,-1,2", [1]),
        ("0,1,0", []),
        ("gpu-2,1", [2, 1]),
        ("GPU-", []),
        ("MIG-GPU-1/0/0,1", []),
        (" 1 , 2", [1, 2]),
    ],
)
def test_cards_that_cuda_does_not_see_are_not_counted(setting: str | None, left: list[int]) -> None:
    found = visible_gpus(machine((8, 0), (8, 0), (8, 0)).gpus, setting)
    assert [gpu.index for gpu in found] == left


# -- the machine and the file --------------------------------------------------------------------------------------


def test_this_machine_can_be_probed() -> None:
    found = probe()
    assert found.cpus >= 1
    assert found.memory_bytes > 1 << 28
    for gpu in found.gpus:
        assert "memory_free" not in gpu.identity(), "a manifest must not change with the neighbours"


def test_an_unknown_fact_about_a_card_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "targets.toml"
    path.write_text('[cpu]\ndtype = "float32"\nquantisation = []\nmemory_gb = 3\n')
    with pytest.raises(UsageError, match=r"\[cpu\]: unknown fact 'memory_gb'; known facts: capability, cuda"):
        load_targets(path)


def test_a_missing_fact_about_a_card_is_named(tmp_path: Path) -> None:
    path = tmp_path / "targets.toml"
    path.write_text("[cpu]\nquantisation = []\n")
    with pytest.raises(UsageError, match=r"images/targets\.toml: \[cpu\]: no 'dtype'"):
        load_targets(path)
