"""The libraries and GPUs that each stage needs on a host."""

import importlib.util
from typing import TYPE_CHECKING

from stages.contract.errors import UsageError
from stages.engines import engine_kind, engine_libraries

if TYPE_CHECKING:
    from stages.contract.recipe import Recipe

LIBRARIES = {
    "preprocess": ("pymupdf", "torch", "sentence_transformers", "data_juicer", "ray"),
    "train": ("torch", "transformers", "peft"),
    "infer": tuple(engine_libraries()),
    "eval": ("numpy", "matplotlib", "jinja2"),
}
"""The libraries that each stage requires, in the order of import."""

STAGES = tuple(LIBRARIES)
"""The stages in the order in which they run."""

OPTIONAL_LIBRARIES = {"train": ("swift", "bitsandbytes", "deepspeed", "gptqmodel", "auto_gptq", "flash_attn")}
"""Libraries that only some targets have or models need."""

GPU_STAGES = ("train", "infer")
"""The stages that need a GPU, unless the target is cpu."""


def missing_libraries(stage: str) -> list[str]:
    """Those of a stage's required libraries that are not installed here."""
    return _not_installed(LIBRARIES[stage])


def refuse_missing_libraries(recipe: "Recipe", stage: str) -> None:
    """Raise UsageError if a library that a stage needs for this recipe is not installed here."""
    missing = _not_installed(_recipe_libraries(recipe, stage))
    if missing:
        raise UsageError(
            f"{stage}: needs {', '.join(missing)}, not installed here; run `make setup`, or `lorry launch` with Docker"
        )


def _recipe_libraries(recipe: "Recipe", stage: str) -> tuple[str, ...]:
    """The libraries that a stage needs for this recipe: of infer, those of the recipe's engine alone."""
    if stage == "infer":
        return tuple(engine_kind(recipe.infer.engine).libraries)
    if stage == "preprocess":
        documents = ("pymupdf", "torch", "sentence_transformers") if recipe.preprocess.retrieval is not None else ()
        return (*documents, *(("data_juicer",) if recipe.preprocess.data_juicer is not None else ()))
    return LIBRARIES[stage]


def _not_installed(libraries: tuple[str, ...]) -> list[str]:
    """Those of the libraries that are not installed here."""
    return [library for library in libraries if importlib.util.find_spec(library) is None]
