"""The targets: facts about the kinds of card that Lorry has images for, read from images/targets.toml."""

import os
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path

from stages.contract.errors import DoesNotFitError, UsageError
from stages.contract.machine_errors import in_pod
from stages.hardware.probe import Gpu, Machine

TARGETS_FILE = Path(__file__).parents[2] / "images" / "targets.toml"


@dataclass(frozen=True)
class Target:
    """A kind of card that Lorry has images for."""

    name: str
    capability: tuple[int, int] | None
    """CUDA compute capability; None for the CPU."""
    memory_gib: int | None
    """Memory of one card in GiB, as sold; None for the CPU."""
    dtype: str
    """Data type that the frozen base computes in: float32, float16 or bfloat16."""
    cuda: str | None
    """CUDA line of its wheels, such as cu128; None for the CPU."""
    min_driver: int | None
    """Least major version of the NVIDIA driver; None for the CPU."""
    quantisation: tuple[str, ...]
    """Weight formats with kernels for the card."""
    deepspeed: bool
    """Whether its train image has DeepSpeed, which ZeRO-3 needs."""
    environment: dict[str, str]
    """Environment variables for its containers."""
    node_label: str | None
    """Value of nvidia.com/gpu.product on Kubernetes nodes with the card."""
    variant_of: str | None
    """The target of the same card from which this one differs in train's wheels; None if it is not a variant."""

    def is_product(self, gpu: Gpu) -> bool:
        """Whether a GPU's name has every word of `node_label`, which is a product's name with dashes for blanks."""
        return bool(self.node_label) and _words(self.node_label) <= _words(gpu.name)

    def likeness(self, gpu: Gpu) -> tuple[bool, int, int, str]:
        """How well the target describes a GPU of its compute capability; the larger, the better.

        It compares the product's name, then the words that it shares with it, then the memory; the target's name
        decides between equals, so that the order of the targets never does.
        """
        shared = len(_words(self.node_label) & _words(gpu.name))
        gap = abs((self.memory_gib or 0) - round(gpu.memory_total / 2**30))
        return self.is_product(gpu), shared, -gap, self.name


def load_targets(path: Path = TARGETS_FILE) -> dict[str, Target]:
    """All targets, by name. A variant has the facts of the target in `variant_of`, except for those that it states.

    Raises UsageError for an unknown or missing fact, and if there is no such file.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; install Lorry again")
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: _target(name, {**table.get(values.get("variant_of"), {}), **values}) for name, values in table.items()
    }


def named_target(name: str, targets: dict[str, Target]) -> Target:
    """The target called `name`. Raises UsageError, with the known names, if there is none."""
    if name not in targets:
        raise UsageError(f"target {name!r}: no such target; known targets: {', '.join(targets)}")
    return targets[name]


def _target(name: str, values: dict[str, object]) -> Target:
    """The target with the facts of one table of targets.toml. Raises UsageError for an unknown or missing fact."""
    known = {field.name for field in fields(Target)} - {"name"}
    for key in [*(values.keys() - known), *({"dtype", "quantisation"} - values.keys())]:
        known_facts = ", ".join(sorted(known))
        state = f"unknown fact {key!r}; known facts: {known_facts}" if key in values else f"no {key!r}; add it"
        raise UsageError(f"images/{TARGETS_FILE.name}: [{name}]: {state}")
    facts = dict(values)
    capability = facts.pop("capability", None)
    parts = tuple(int(part) for part in str(capability).split(".")) if capability else None
    quantisation: tuple[str, ...] = tuple(facts.pop("quantisation"))  # type: ignore[arg-type]
    defaults: dict[str, object] = {
        "memory_gib": None,
        "cuda": None,
        "min_driver": None,
        "node_label": None,
        "variant_of": None,
        "deepspeed": True,
        "environment": {},
    }
    return Target(name=name, capability=parts, quantisation=quantisation, **{**defaults, **facts})  # type: ignore[arg-type]


def machine_target(machine: Machine, targets: dict[str, Target]) -> Target:
    """The target of a machine's GPUs; `cpu` without GPUs.

    It is the newest target that is not newer than the GPUs; of several with the same capability, the one that is most
    like the GPUs' product (`Target.likeness`). Variants are left out. Raises UsageError if the GPUs differ in compute
    capability or target, or are older than every target.
    """
    capabilities = {gpu.capability for gpu in machine.gpus}
    if not capabilities:
        return targets["cpu"]
    if len(capabilities) > 1:
        different = ", ".join(map(_version_text, sorted(capabilities)))
        raise UsageError(
            f"visible GPUs: differ in compute capability ({different}); choose GPUs of one kind (GPUS=...)"
        )
    found = {target.name: target for gpu in machine.gpus if (target := gpu_target(gpu, targets))}
    if not found:
        raise UsageError(
            f"visible GPUs: compute capability {_version_text(capabilities.pop())} is older than every target in"
            f" images/{TARGETS_FILE.name}; choose other GPUs (GPUS=...), or set TARGET=cpu"
        )
    if len(found) > 1:
        raise UsageError(f"visible GPUs: differ in target ({', '.join(found)}); choose GPUs of one kind (GPUS=...)")
    return found.popitem()[1]


def gpu_target(gpu: Gpu, targets: dict[str, Target]) -> Target | None:
    """The target of one GPU, as `machine_target` chooses it; None if the GPU is older than every target."""
    cards = [target for target in targets.values() if target.variant_of is None and target.capability is not None]
    fitting = [target for target in cards if (target.capability or (0, 0)) <= gpu.capability]
    return max(fitting, key=lambda target: (target.capability or (0, 0), target.likeness(gpu)), default=None)


def _words(name: str | None) -> set[str]:
    """The words of a product's name, in lower case. NVML puts blanks or dashes between them, Kubernetes only dashes."""
    return {*(name or "").lower().replace("-", " ").split()}


def working_target(machine: Machine, targets: dict[str, Target]) -> Target:
    """The target of the GPUs that a stage uses; `cpu` if LORRY_TARGET is `cpu`.

    LORRY_TARGET names the image's target. It is returned only if it has the same compute capability as the target of
    the GPUs (`machine_target`) and they are not another target's product; otherwise, and without LORRY_TARGET, the
    target of the GPUs is returned. A variant keeps its facts on wheels, and gets the environment of the GPUs. Raises
    DoesNotFitError if the machine's GPUs cannot be seen because of a driver problem, if an image for a card sees no GPU
    or an older GPU than its kernels need, or if the driver is too old for the image's CUDA. Raises UsageError for an
    unknown LORRY_TARGET, and the errors of `machine_target`.
    """
    name = os.environ.get("LORRY_TARGET")
    if name != "cpu" and machine.problem:  # it has GPUs that cannot be used: do not spend hours on its CPU
        raise DoesNotFitError(f"{machine.problem}, or set LORRY_TARGET=cpu to compute without GPUs")
    if not name:
        return machine_target(machine, targets)
    image = named_target(name, targets)
    if image.capability is None:
        return image
    if not machine.gpus:
        cure = (
            "give the pod a limit of nvidia.com/gpu" if in_pod() else "give it one (make: GPUS=0; docker run: --gpus)"
        )
        raise DoesNotFitError(f"LORRY_TARGET={name}: needs a GPU, but none is visible; {cure}, or use TARGET=cpu")
    card, cards_target = machine.gpus[0], machine_target(machine, targets)
    if card.capability < image.capability:
        raise DoesNotFitError(
            f"LORRY_TARGET={name}: needs compute capability {_version_text(image.capability)} or higher, but"
            f" {card.name} has {_version_text(card.capability)}; use TARGET={cards_target.name}"
        )
    refuse_old_driver(image, card.driver)
    is_other_product = cards_target.is_product(card) and not image.is_product(card)
    if image.capability != cards_target.capability or (is_other_product and image.variant_of is None):
        return cards_target
    return replace(image, environment=cards_target.environment) if is_other_product else image


def refuse_old_driver(target: Target, driver: str) -> None:
    """Raise DoesNotFitError if the NVIDIA driver is too old for the CUDA in the target's images.

    `driver` is its version as NVIDIA writes it, such as `535.129.03`.
    """
    if target.min_driver and int(driver.partition(".")[0]) < target.min_driver:
        raise DoesNotFitError(
            f"target {target.name}: its CUDA ({target.cuda}) needs NVIDIA driver {target.min_driver} or newer, but this"
            f" machine has {driver}; update the driver, or use a target with an older CUDA (images/{TARGETS_FILE.name})"
        )


def refuse_driver_too_old_for_cuda(cuda: str, driver: str, targets: dict[str, Target]) -> None:
    """Raise DoesNotFitError if the NVIDIA driver is too old for a CUDA version, such as `12.8`.

    This is for a torch outside the images. CUDA versions with the same major number need the same driver. A major
    number that no target has is not checked.
    """
    major = f"cu{cuda.partition('.')[0]}"
    least = min((t.min_driver for t in targets.values() if t.min_driver and (t.cuda or "")[:4] == major), default=0)
    if int(driver.partition(".")[0]) < least:
        raise DoesNotFitError(
            f"torch: built for CUDA {cuda}, which needs NVIDIA driver {least} or newer, but this machine has {driver};"
            " update the driver, or install torch for an older CUDA"
        )


def refuse_4bit_without_kernels(target: Target) -> None:
    """Raise DoesNotFitError if the target has no kernels for a base in 4 bits."""
    if "bitsandbytes" not in target.quantisation:
        raise DoesNotFitError(
            f"train.load_in_4bit: bitsandbytes has no kernels for target {target.name}; set it to false"
        )


def refuse_4bit_twice(model: Path, quantisation: str | None) -> None:
    """Raise UsageError if the base of a recipe with train.load_in_4bit has quantised weights already.

    `quantisation` is their format, such as gptq; None: they are not quantised.
    """
    if quantisation:
        raise UsageError(f"{model}: its weights are quantised already ({quantisation}); remove train.load_in_4bit")


def refuse_base_without_kernels(model: Path, quantisation: str | None, target: Target) -> None:
    """Raise DoesNotFitError if the target has no kernels for the format of a base's quantised weights.

    `quantisation` is that format, such as gptq or awq; None: the weights are not quantised.
    """
    if quantisation and quantisation not in target.quantisation:
        others = ", ".join(target.quantisation) or "none"
        raise DoesNotFitError(
            f"{model}: target {target.name} has no kernels for its {quantisation} weights (it has: {others}); use the"
            " unquantised model, or another target"
        )


def base_dtype(setting: str, target: Target) -> str:
    """Data type that the frozen base computes in: `float32`, `float16` or `bfloat16`. `setting` is train.precision.

    The compute capability decides. torch does not: it reports bfloat16 as supported on a V100, which only emulates it.
    Raises DoesNotFitError for a data type that the target does not have.
    """
    if setting == "auto":
        return target.dtype
    if target.capability is None and setting != "float32":
        raise DoesNotFitError(
            f"train.precision {setting}: a CPU trains in float32 only (torch scales no float16 gradients there, and"
            " bfloat16 is slower than float32 without special instructions); set it to auto"
        )
    if setting == "bfloat16" and target.capability is not None and target.capability < (8, 0):
        raise DoesNotFitError(
            f"train.precision bfloat16: needs compute capability 8.0 or higher, but {target.name} has"
            f" {_version_text(target.capability)} and only emulates it; set it to auto, which is {target.dtype} here"
        )
    return setting


def _version_text(capability: tuple[int, int]) -> str:
    """A compute capability as NVIDIA writes it, such as 8.0."""
    return f"{capability[0]}.{capability[1]}"
