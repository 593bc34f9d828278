"""The libraries and GPUs that each stage needs on a host."""

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING

from stages.contract.errors import UsageError
from stages.engines import engine_kind, engine_libraries
from stages.models import embedder

if TYPE_CHECKING:
    from stages.contract.recipe import Recipe
    from stages.contract.run import Run

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

GPU_STAGES = ("preprocess", "train", "infer")
"""The stages that may compute on GPUs. `stages_on_gpus` says which do for a recipe."""

EMBEDDER = "preprocess.retrieval.embedder"
CLASSIFIER = "preprocess.classifier"


def stages_on_gpus(run: "Run", stages: Iterable[str]) -> tuple[str, ...]:
    """Those of the stages that compute on GPUs, unless the target is cpu: train and infer do, eval does not, and
    preprocess does if its recipe has a model for it (`preprocess_models`)."""
    return tuple(stage for stage in stages if stage in GPU_STAGES and (stage != "preprocess" or preprocess_models(run)))


def preprocess_models(run: "Run") -> dict[str, str]:
    """The models that preprocess computes on GPUs, as the recipe names their folders, by the recipe key of each.

    They are an embedder that needs a GPU (a small embedder of texts does not), the base if it classifies questions, and
    the weights of Data-Juicer's operators. A folder may be missing.
    """
    settings = run.recipe.preprocess
    found: dict[str, str] = {}
    if settings.data_juicer is not None:
        found |= settings.data_juicer.weight_folders(on_gpu=True)
    if settings.retrieval is not None and embedder.needs_gpu(run.roots.models / settings.retrieval.embedder):
        found[EMBEDDER] = settings.retrieval.embedder
    if settings.classifier == "model":
        found[CLASSIFIER] = run.recipe.model.path
    return found


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
