"""Which run a command is about: a recipe by path or by name, and the run folder that it belongs to."""

from pathlib import Path
from typing import TYPE_CHECKING

from stages.contract.errors import UsageError
from stages.contract.roots import Roots

if TYPE_CHECKING:
    from stages.contract.run import Run

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe_path(recipe: str) -> Path:
    """The file of a recipe given by path or by name."""
    for path in (Path(recipe), RECIPES / f"{recipe}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise UsageError(f"{recipe}: no such recipe file, and no such name in {RECIPES}; there are: {names}")


def open_run(
    recipe: str | None,
    profile: str | None = None,
    data: str | None = None,
    overrides: tuple[str, ...] = (),
    run_name: str | None = None,
) -> "Run":
    """The run that the options of `recipe_options` name."""
    from stages.contract.recipe import load_recipe, place_of_key
    from stages.contract.run import Run
    from stages.engines import engine_kind
    from stages.tasks import settle_recipe

    roots = Roots.from_environment()
    if recipe is not None:
        path = recipe_path(recipe)
    elif run_name is not None:
        path = roots.runs / run_name / "recipe.yaml"
        if not path.is_file():
            raise UsageError(f"{path}: no such run; name a RECIPE to begin one")
    else:
        raise UsageError("name a RECIPE, or --run with the name of a run")
    loaded = load_recipe(path, profile, overrides, Path(data) if data else None)
    try:
        engine_kind(loaded.infer.engine)
    except UsageError as error:
        raise UsageError(f"{place_of_key(path, ('infer', 'engine'), loaded.profile)}: {error}") from error
    name = run_name or path.stem
    if name in (".", "..") or "/" in name:
        raise UsageError(f"--run {name}: a run's name is one folder name, without '/'")
    return Run(name, settle_recipe(loaded, str(path), roots.data), roots)
