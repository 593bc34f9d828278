"""The host command `lorry`: run a recipe's stages, look at recipes, see how runs stand."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from entrypoints.common import one_line_errors, recipe_options
from entrypoints.compare import compare
from entrypoints.doctor import doctor
from entrypoints.launch import launch, run_process
from entrypoints.ledger import ledger
from entrypoints.plan import plan
from stages.host.runs import RECIPES, open_run, recipe_path


@click.group()
def main() -> None:
    """Carry a fine-tuning job from raw documents to scored answers."""


main.add_command(launch)
main.add_command(doctor)
main.add_command(plan)
main.add_command(ledger)
main.add_command(compare)


@main.command()
@recipe_options
@click.option("--force", is_flag=True, help="Do every stage again from nothing.")
@one_line_errors
def run(force: bool, **options: Any) -> None:
    """Run the four stages in order; those that are done are skipped.

    RECIPE is a file, or a name in recipes/; without it, the run's own recipe.yaml is used.
    """
    from stages.contract.errors import LorryError
    from stages.contract.files import FileHashes
    from stages.contract.run import STAGES
    from stages.contract.stop import StopRequest

    stop = StopRequest()
    stop.install()
    opened = open_run(**options)
    arguments = sys.argv[sys.argv.index("run") + 1 :]
    for stage in STAGES:
        hashes = FileHashes(opened.stage_folder(stage) / ".hashes.json")
        try:
            done = not force and opened.is_done(stage, hashes)
        except (LorryError, OSError):  # the stage itself says what is wrong
            done = False
        stop.check()
        if done:
            click.echo(f"{stage}: up to date")
            continue
        code = run_process(stage, arguments, stop)
        if code != 0:
            sys.exit(code)
    report = opened.path("eval", "report.html")
    click.echo(f"all four stages are up to date; report: {report}")


@main.command()
@click.argument("run_name", metavar="[RUN]", required=False)
def status(run_name: str | None) -> None:
    """Show how far a run is, or all runs."""
    from stages.contract.roots import Roots

    runs = Roots.from_environment().runs
    folders = [runs / run_name] if run_name else sorted(path.parent for path in runs.glob("*/recipe.yaml"))
    if not folders or not (folders[0] / "recipe.yaml").is_file():
        click.echo(f"no run in {runs}" if run_name is None else f"error: {folders[0]}: no such run", err=True)
        sys.exit(0 if run_name is None else 2)
    for folder in folders:
        click.echo(folder.name)
        for line in _stage_lines(folder):
            click.echo(f"  {line}")


def _stage_lines(folder: Path) -> list[str]:
    from stages.contract.events import read_last_event
    from stages.contract.run import STAGES, is_held

    lines = []
    for stage in STAGES:
        try:
            manifest = json.loads((folder / stage / "manifest.json").read_text())
            lines.append(f"{stage:<11}done, {manifest['seconds']:.0f} s, {manifest['end']}")
            continue
        except (OSError, ValueError, KeyError, TypeError):  # not there, damaged, or of another version
            last = read_last_event(folder / stage / "events.jsonl")
        shards = _shards_line(folder, stage)
        if shards:
            lines.append(f"{stage:<11}{shards}")
        if last is None:
            lines += [] if shards else [f"{stage:<11}not run"]
            continue
        state = "running" if is_held(folder / stage) else "stopped, half done"
        ago = f"{max(time.time() - last['time'], 0):.0f} s ago"
        if last["event"] == "progress":
            eta = f", {last['eta_seconds']:.0f} s left" if "eta_seconds" in last and state == "running" else ""
            speed = f", {last['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in last else ""
            memory = f", {last['memory'] / 1024**3:.1f} GiB" if "memory" in last else ""
            what = f"{last['activity']} {last['step']}/{last['total']} {last['unit']}{speed}{memory}{eta}"
        else:
            what = last.get("error", last["event"])
        lines.append(f"{stage:<11}{state}: {what} ({ago})")
    return lines


def _shards_line(folder: Path, stage: str) -> str:
    """How many shards of a stage are done, for each number that it was divided by; empty where it was not."""
    from stages.contract.run import is_held

    counts: dict[int, list[Path]] = {}
    for shard in (folder / "shards" / stage).glob("*-of-*"):
        counts.setdefault(int(shard.name.partition("-of-")[2]), []).append(shard)
    told = []
    for count, shards in sorted(counts.items()):
        done = sum((shard / "manifest.json").is_file() for shard in shards)
        running = sum(is_held(shard) for shard in shards)
        told.append(f"{done} of {count} shards done" + (f", {running} running" if running else ""))
    return "; ".join(told)


@main.group()
def recipe() -> None:
    """Look at recipes."""


@recipe.command("list")
def list_recipes() -> None:
    """List the recipes that come with Lorry."""
    import yaml

    from stages.contract.recipe import profile_names

    for path in sorted(RECIPES.glob("*.yaml")):
        description = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("description", "")
        profiles = ", ".join(profile_names(path))
        click.echo(f"{path.stem:<16}{description}" + (f" (profiles: {profiles})" if profiles else ""))


@recipe.command()
@recipe_options
@one_line_errors
def show(**options: Any) -> None:
    """Print a recipe as it would run, profile and overrides applied."""
    from stages.contract.recipe import dump_recipe

    click.echo(dump_recipe(open_run(**options).recipe), nl=False)


@recipe.command()
@click.argument("recipe")
@one_line_errors
def validate(recipe: str) -> None:
    """Check a recipe with each of its profiles."""
    from stages.contract.recipe import profile_names

    for profile in [None, *profile_names(recipe_path(recipe))]:
        open_run(recipe, profile)
        click.echo(f"{recipe}: valid" + (f" with profile {profile}" if profile else ""))


@recipe.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from stages.contract.recipe import recipe_file_schema
    from stages.engines import engine_names

    click.echo(json.dumps(recipe_file_schema(engine_names()), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
