"""Facts about cards, read from the one place that has them: images/targets.toml."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from stages.contract.errors import UsageError
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
    environment: dict[str, str]
    node_label: str | None


def load_targets(path: Path = TARGETS_FILE) -> dict[str, Target]:
    """All targets by name."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: _target(name, values) for name, values in table.items()}


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
    fitting = [t for t in targets.values() if t.capability is not None and t.capability <= found]
    if not fitting:
        raise UsageError(f"compute capability {found[0]}.{found[1]} is older than every target in {TARGETS_FILE.name}")
    return max(fitting, key=lambda target: target.capability or (0, 0))
