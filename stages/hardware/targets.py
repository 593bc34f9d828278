"""Facts about cards, read from the one place that has them: images/targets.toml."""

import os
import tomllib
from dataclasses import dataclass
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
    """What the frozen base computes in: float32, float16 or bfloat16."""
    cuda: str | None
    min_driver: int | None
    quantisation: tuple[str, ...]
    deepspeed: bool
    """Whether its image for training has DeepSpeed, which ZeRO needs."""
    environment: dict[str, str]
    node_label: str | None
    variant_of: str | None
    """The target whose card this one is for, with other software."""


def load_targets(path: Path = TARGETS_FILE) -> dict[str, Target]:
    """All targets by name; a variant has its card's facts, where it does not state its own."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: _target(name, {**table.get(values.get("variant_of"), {}), **values}) for name, values in table.items()
    }


def named_target(name: str, targets: dict[str, Target]) -> Target:
    """The target of that name. Raises UsageError with the known ones."""
    if name not in targets:
        raise UsageError(f"no target {name!r}; there are: {', '.join(targets)}")
    return targets[name]


def _target(name: str, values: dict[str, object]) -> Target:
    fields = dict(values)
    capability = fields.pop("capability", None)
    parts = tuple(int(part) for part in str(capability).split(".")) if capability else None
    quantisation: tuple[str, ...] = tuple(fields.pop("quantisation"))  # type: ignore[arg-type]
    defaults: dict[str, object] = {
        "memory_gib": None,
        "cuda": None,
        "min_driver": None,
        "node_label": None,
        "variant_of": None,
        "deepspeed": True,
        "environment": {},
    }
    return Target(name=name, capability=parts, quantisation=quantisation, **{**defaults, **fields})  # type: ignore[arg-type]


def target_of(machine: Machine, targets: dict[str, Target]) -> Target:
    """The target of this machine's cards, decided by compute capability and not by the card's name.

    A newer card than any listed takes the newest target that is not newer than the card. Raises UsageError for
    cards of different capabilities in one machine, and for one older than every target.
    """
    capabilities = {gpu.capability for gpu in machine.gpus}
    if not capabilities:
        return targets["cpu"]
    if len(capabilities) > 1:
        raise UsageError(
            f"the visible GPUs differ in compute capability {sorted(capabilities)}: choose GPUs of one kind"
        )
    found = capabilities.pop()
    cards = [target for target in targets.values() if target.variant_of is None]
    fitting = [target for target in cards if target.capability is not None and target.capability <= found]
    if not fitting:
        raise UsageError(f"compute capability {found[0]}.{found[1]} is older than every target in {TARGETS_FILE.name}")
    return max(fitting, key=lambda target: target.capability or (0, 0))


def working_target(machine: Machine, targets: dict[str, Target]) -> Target:
    """What a stage computes as, once it really needs a card: by its cards, which must fit the image it runs in.

    LORRY_TARGET says what the image was built for; without it (no image) the cards alone decide. Raises
    DoesNotFitError when there is no card, it is older than the image's kernels, or its driver too old for their CUDA.
    """
    name = os.environ.get("LORRY_TARGET")
    if name != "cpu" and machine.problem:  # there are cards, and none can be used: no reason to take hours on a CPU
        raise DoesNotFitError(f"{machine.problem} (LORRY_TARGET=cpu computes without cards)")
    if not name:
        return target_of(machine, targets)
    image = named_target(name, targets)
    if image.capability is None:
        return image
    if not machine.gpus:
        raise DoesNotFitError(
            f"this image is for {name} cards and no GPU is visible: hand it one (make: GPUS=0; docker run: --gpus;"
            " Kubernetes: a limit of nvidia.com/gpu), or take TARGET=cpu"
        )
    card, cards_target = machine.gpus[0], target_of(machine, targets)
    if card.capability < image.capability:
        raise DoesNotFitError(
            f"this image is for {name} (compute capability {_dotted(image.capability)}), newer than the card,"
            f" {card.name} ({_dotted(card.capability)}): take TARGET={cards_target.name}"
        )
    refuse_old_driver(image, card.driver)
    return image if image.capability == cards_target.capability else cards_target


def refuse_old_driver(image: Target, driver: str) -> None:
    """Raise DoesNotFitError where the NVIDIA driver is older than the CUDA of the target's images needs."""
    if image.min_driver and int(driver.partition(".")[0]) < image.min_driver:
        raise DoesNotFitError(
            f"this image's CUDA ({image.cuda}) needs NVIDIA driver {image.min_driver} or newer, and this machine has"
            f" {driver}: update it, or take a target of an older CUDA ({TARGETS_FILE.name})"
        )


def refuse_old_driver_for(cuda: str, driver: str, targets: dict[str, Target]) -> None:
    """The same for a CUDA version such as `12.8` of a torch that is in no image: all of one major version need the same
    driver. One that no target has is passed."""
    major = f"cu{cuda.partition('.')[0]}"
    least = min((t.min_driver for t in targets.values() if t.min_driver and (t.cuda or "")[:4] == major), default=0)
    if int(driver.partition(".")[0]) < least:
        raise DoesNotFitError(
            f"the torch installed here is built for CUDA {cuda}, which needs NVIDIA driver {least} or newer, and this"
            f" machine has {driver}: update it, or install torch for an older CUDA"
        )


def refuse_4bit_without_kernels(target: Target) -> None:
    """Raise DoesNotFitError where nothing computes with a base in 4 bits."""
    if "bitsandbytes" not in target.quantisation:
        raise DoesNotFitError(f"train.load_in_4bit: bitsandbytes has no kernels for target {target.name}; set it false")


def refuse_4bit_twice(model: Path, quantisation: str | None) -> None:
    """Raise UsageError for train.load_in_4bit with a base whose weights are quantised as they are stored."""
    if quantisation:
        raise UsageError(f"{model}: its weights are {quantisation}'s already: leave train.load_in_4bit out")


def refuse_base_without_kernels(model: Path, quantisation: str | None, target: Target) -> None:
    """Raise DoesNotFitError where nothing computes with a base that is stored quantised: GPTQ, AWQ and the like."""
    if quantisation and quantisation not in target.quantisation:
        others = ", ".join(target.quantisation) or "none"
        raise DoesNotFitError(
            f"{model}: its weights are {quantisation}'s, for which target {target.name} has no kernels (it has:"
            f" {others}): name the model's plain weights, or another target"
        )


def precision_of(setting: str, target: Target) -> str:
    """What the frozen base computes in: `float32`, `float16` or `bfloat16`; `setting` is the recipe's train.precision.

    By the target's compute capability and not by what torch says: it has bfloat16 on a V100, too, emulated and slow.
    Raises DoesNotFitError for a named one that these cards do not have.
    """
    if setting == "auto":
        return target.dtype
    if target.capability is None and setting != "float32":
        raise DoesNotFitError(
            f"train.precision {setting}: a processor trains in float32 (torch scales no float16 gradients there, and"
            " bfloat16 is slower than float32 without special instructions): leave it at auto"
        )
    if setting == "bfloat16" and target.capability is not None and target.capability < (8, 0):
        raise DoesNotFitError(
            f"train.precision bfloat16 needs compute capability 8.0 and this is {target.name}"
            f" ({_dotted(target.capability)}), where it is only emulated: leave it at auto, which is {target.dtype}"
        )
    return setting


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
