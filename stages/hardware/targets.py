"""Targets: facts about the kinds of card that Lorry has images for, read from images/targets.toml."""

import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from stages.contract.errors import DoesNotFitError, UsageError
from stages.hardware.probe import Machine

TARGETS_FILE = Path(__file__).parents[2] / "images" / "targets.toml"


@dataclass(frozen=True)
class Target:
    """A kind of card that Lorry has images for."""

    name: str
    capability: tuple[int, int] | None
    """CUDA compute capability; None for the CPU."""
    memory_gib: int | None
    dtype: str
    """Data type that the frozen base computes in: float32, float16 or bfloat16."""
    cuda: str | None
    """Line of wheels, such as cu128; None for the CPU."""
    min_driver: int | None
    quantisation: tuple[str, ...]
    deepspeed: bool
    """Whether its train image has DeepSpeed, which ZeRO needs."""
    environment: dict[str, str]
    node_label: str | None
    variant_of: str | None
    """The target for the same card, if this one only has other software."""


def load_targets(path: Path = TARGETS_FILE) -> dict[str, Target]:
    """All targets by name. A variant takes the facts that it does not state from the target that it is a variant of.

    Raises UsageError for an unknown fact or a missing one.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: _target(name, {**table.get(values.get("variant_of"), {}), **values}) for name, values in table.items()
    }


def named_target(name: str, targets: dict[str, Target]) -> Target:
    """The target with a name. Raises UsageError, with the known names, if there is none."""
    if name not in targets:
        raise UsageError(f"no target {name!r}; known targets: {', '.join(targets)}")
    return targets[name]


def _target(name: str, values: dict[str, object]) -> Target:
    known = {field.name for field in fields(Target)} - {"name"}
    for key in [*(values.keys() - known), *({"dtype", "quantisation"} - values.keys())]:
        state = f"unknown fact {key!r}; known facts: {', '.join(sorted(known))}" if key in values else f"no {key!r}"
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


def target_of(machine: Machine, targets: dict[str, Target]) -> Target:
    """The target of this machine's GPUs, by their compute capability and not by their name.

    It is the newest target that is not newer than the GPUs, and the first of several with the same capability. Raises
    UsageError for GPUs of different capabilities in one machine, and for GPUs older than every target.
    """
    capabilities = {gpu.capability for gpu in machine.gpus}
    if not capabilities:
        return targets["cpu"]
    if len(capabilities) > 1:
        raise UsageError(
            f"the visible GPUs differ in compute capability ({', '.join(map(_version, sorted(capabilities)))}); choose"
            " GPUs of one kind (GPUS=...)"
        )
    found = capabilities.pop()
    cards = [target for target in targets.values() if target.variant_of is None]
    fitting = [target for target in cards if target.capability is not None and target.capability <= found]
    if not fitting:
        raise UsageError(f"compute capability {_version(found)} is older than every target in {TARGETS_FILE.name}")
    return max(fitting, key=lambda target: target.capability or (0, 0))


def working_target(machine: Machine, targets: dict[str, Target]) -> Target:
    """The target that a stage computes as, when it needs a GPU: that of its GPUs, which must fit the image.

    LORRY_TARGET names the image's target; without it (no image) the GPUs alone decide. Raises DoesNotFitError if there
    is no GPU, it is older than the image's kernels, or its driver is too old for their CUDA.
    """
    name = os.environ.get("LORRY_TARGET")
    if name != "cpu" and machine.problem:  # the machine has GPUs that cannot be used: do not spend hours on its CPU
        raise DoesNotFitError(f"{machine.problem} (LORRY_TARGET=cpu computes without GPUs)")
    if not name:
        return target_of(machine, targets)
    image = named_target(name, targets)
    if image.capability is None:
        return image
    if not machine.gpus:
        raise DoesNotFitError(
            f"this image is for {name} cards and no GPU is visible; give it one (make: GPUS=0; docker run: --gpus;"
            " Kubernetes: a limit of nvidia.com/gpu), or use TARGET=cpu"
        )
    card, cards_target = machine.gpus[0], target_of(machine, targets)
    if card.capability < image.capability:
        raise DoesNotFitError(
            f"this image is for {name} (compute capability {_version(image.capability)}), newer than this GPU,"
            f" {card.name} ({_version(card.capability)}); use TARGET={cards_target.name}"
        )
    refuse_old_driver(image, card.driver)
    return image if image.capability == cards_target.capability else cards_target


def refuse_old_driver(image: Target, driver: str) -> None:
    """Raise DoesNotFitError if the NVIDIA driver is older than the CUDA of the target's images needs."""
    if image.min_driver and int(driver.partition(".")[0]) < image.min_driver:
        raise DoesNotFitError(
            f"this image's CUDA ({image.cuda}) needs NVIDIA driver {image.min_driver} or newer, and this machine has"
            f" {driver}; update it, or use a target with an older CUDA ({TARGETS_FILE.name})"
        )


def refuse_old_driver_for(cuda: str, driver: str, targets: dict[str, Target]) -> None:
    """The same for a CUDA version such as `12.8` of a torch outside the images. All versions with the same major number
    need the same driver; a major number that no target has is not checked."""
    major = f"cu{cuda.partition('.')[0]}"
    least = min((t.min_driver for t in targets.values() if t.min_driver and (t.cuda or "")[:4] == major), default=0)
    if int(driver.partition(".")[0]) < least:
        raise DoesNotFitError(
            f"the torch installed here is built for CUDA {cuda}, which needs NVIDIA driver {least} or newer, and this"
            f" machine has {driver}; update it, or install torch for an older CUDA"
        )


def refuse_4bit_without_kernels(target: Target) -> None:
    """Raise DoesNotFitError if the target has no kernels for a base in 4 bits."""
    if "bitsandbytes" not in target.quantisation:
        raise DoesNotFitError(
            f"train.load_in_4bit: bitsandbytes has no kernels for target {target.name}; set it to false"
        )


def refuse_4bit_twice(model: Path, quantisation: str | None) -> None:
    """Raise UsageError for train.load_in_4bit with a base whose stored weights are quantised."""
    if quantisation:
        raise UsageError(f"{model}: its weights are quantised already ({quantisation}); remove train.load_in_4bit")


def refuse_base_without_kernels(model: Path, quantisation: str | None, target: Target) -> None:
    """Raise DoesNotFitError if the target has no kernels for the format of a quantised base, such as GPTQ or AWQ."""
    if quantisation and quantisation not in target.quantisation:
        others = ", ".join(target.quantisation) or "none"
        raise DoesNotFitError(
            f"{model}: target {target.name} has no kernels for its {quantisation} weights (it has: {others}); use the"
            " unquantised model, or another target"
        )


def precision_of(setting: str, target: Target) -> str:
    """Data type that the frozen base computes in: `float32`, `float16` or `bfloat16`; `setting` is train.precision.

    The target's compute capability decides, not torch, which reports bfloat16 on a V100, where it is emulated and slow.
    Raises DoesNotFitError if the recipe names a data type that the target does not have.
    """
    if setting == "auto":
        return target.dtype
    if target.capability is None and setting != "float32":
        raise DoesNotFitError(
            f"train.precision {setting}: a CPU trains in float32 (torch scales no float16 gradients there, and bfloat16"
            " is slower than float32 without special instructions); set it to auto"
        )
    if setting == "bfloat16" and target.capability is not None and target.capability < (8, 0):
        raise DoesNotFitError(
            f"train.precision bfloat16 needs compute capability 8.0 and this is {target.name}"
            f" ({_version(target.capability)}), where it is only emulated; set it to auto, which is {target.dtype}"
        )
    return setting


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
