"""Finds the run that a command names: the recipe by path or name, the run folder, and the stages that are done."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.contract.errors import LorryError, UsageError
from stages.contract.roots import Roots

if TYPE_CHECKING:
    from stages.contract.run import Run

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe_path(recipe: str) -> Path:
    """The file of a recipe, given as a path or as its name in recipes/. Raises UsageError if there is none."""
    for path in (Path(recipe), RECIPES / f"{recipe}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(path.stem for path in shipped_recipes())
    raise UsageError(f"{recipe}: no such recipe file, and no such name in {RECIPES}; known recipes: {names}")


def shipped_recipes() -> list[Path]:
    """The files of the recipes that come with Lorry, sorted by name. Raises UsageError if there are none."""
    found = sorted(RECIPES.glob("*.yaml"))
    if not found:
        raise UsageError(f"{RECIPES}: no recipes here; install Lorry again, or name a recipe by its path")
    return found


def recipe_summary(path: Path) -> tuple[str, list[str]]:
    """The description in a recipe file (empty if it has none), and the names of its profiles."""
    import yaml

    from stages.contract.recipe import profile_names

    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return values.get("description", ""), profile_names(path)


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, with the names of the engines as values of infer.engine."""
    from stages.contract.recipe import recipe_file_schema
    from stages.engines import engine_names

    return recipe_file_schema(engine_names())


def open_run(
    recipe: str | None,
    profile: str | None = None,
    data: str | None = None,
    overrides: tuple[str, ...] = (),
    run_name: str | None = None,
    say: Callable[[str, str], None] | None = None,
) -> "Run":
    """The run that a command's options name, with its resolved recipe.

    Without `recipe`, it is the recipe of the existing run `run_name`. `say` gets, for each key of the recipe that is
    ignored, its section and a line. Raises UsageError if the recipe, run, task or engine does not exist, if the recipe
    is wrong, or if `run_name` cannot be the name of one folder.
    """
    from stages.contract.recipe import load_recipe, locate_key
    from stages.contract.run import Run
    from stages.engines import engine_kind
    from stages.tasks import settle_recipe

    roots = Roots.from_environment()
    if recipe is not None:
        path = recipe_path(recipe)
    elif run_name is not None:
        path = roots.runs / run_name / "recipe.yaml"
        if not path.is_file():
            raise UsageError(f"{path}: no such run; name a RECIPE to start one")
    else:
        raise UsageError("RECIPE: not given, and no --run either; name a RECIPE, or an existing run with --run")
    loaded = load_recipe(path, profile, overrides, Path(data) if data else None, say)
    try:
        engine_kind(loaded.infer.engine)
    except UsageError as error:
        raise UsageError(f"{locate_key(path, ('infer', 'engine'), loaded.profile)}: {error}") from error
    name = run_name or path.stem
    if name in (".", "..") or "/" in name:
        raise UsageError(
            f"--run {name}: not a name for one folder; choose a name with letters or digits and without '/'"
        )
    return Run(name, settle_recipe(loaded, str(path), roots.data), roots)


def stage_arguments(options: dict[str, Any]) -> list[str]:
    """The arguments of a stage's command for the options that name a run (`open_run`)."""
    arguments = [options["recipe"]] if options["recipe"] else []
    for name, value in (("--profile", options["profile"]), ("--data", options["data"]), ("--run", options["run_name"])):
        arguments += [name, value] if value else []
    return arguments + [part for override in options["overrides"] for part in ("--set", override)]


def is_done(run: "Run", stage: str) -> bool:
    """Whether a stage is done with the present recipe and inputs.

    False also if this cannot be checked: the stage then starts and reports the error itself.
    """
    from stages.contract.files import FileHashes

    hashes = FileHashes(run.stage_folder(stage) / ".hashes.json")
    try:
        return run.manifest(stage) is not None and run.is_done(stage, hashes)
    except (LorryError, OSError):
        return False


def unfinished_stages(stages: tuple[str, ...], last: str, force: bool, options: dict[str, Any]) -> tuple[str, ...]:
    """The stages from the first one that is not done; empty if all are. Only these can need a GPU.

    With `force`, the stage `last` counts as not done. `options` name the run; raises the errors of `open_run`.
    """
    run = open_run(**options)
    for number, stage in enumerate(stages):
        if (force and stage == last) or not is_done(run, stage):
            return stages[number:]
    return ()


def run_folder(options: dict[str, Any]) -> Path:
    """The folder of the run that `options` name, as for `open_run`, without reading its recipe."""
    return Roots.from_environment().runs / (options["run_name"] or recipe_path(options["recipe"]).stem)


def result_lines(folder: Path, stage: str) -> list[str]:
    """Lines that name a stage's results in the run's folder, as absolute paths: the adapters after train, the
    predictions after infer; all of these and the report after eval. What is not there has no line."""
    found: dict[str, Path] = {}
    if stage in ("train", "eval"):
        adapters = sorted(path for path in folder.glob("train/adapters/*") if not path.name.startswith("."))
        found |= {f"adapter {path.name}": path for path in adapters}
    if stage in ("infer", "eval"):
        found["predictions"] = folder / "infer" / "predictions"
    if stage == "eval":
        found["report"] = folder / "eval" / "report.html"
    return [f"{what}: {path}" for what, path in found.items() if path.exists()]
