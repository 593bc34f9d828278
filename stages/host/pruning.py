"""Does the work of `lorry prune`: deletes the adapters of a run that a later training replaced."""

from collections.abc import Generator

from stages.contract.errors import UsageError
from stages.contract.files import remove, visible_files
from stages.contract.machine_errors import machine_error
from stages.contract.roots import Roots
from stages.contract.run import lock_stage_folder
from stages.contract.superseded import SUPERSEDED


def prune(run_name: str) -> Generator[str, None, None]:
    """Delete the replaced adapters and connectors of a run and of its shards. Yields a line for each.

    Raises UsageError if there is no such run or a file may not be deleted, and InterruptedRunError if a process is
    training in the run.
    """
    folder = Roots.from_environment().runs / run_name
    if not (folder / "recipe.yaml").is_file():
        raise UsageError(f"{folder}: no such run; `lorry status` lists all runs")
    found = [place / SUPERSEDED for place in (folder / "train", *sorted(folder.glob("shards/train/*/")))]
    found = [place for place in found if place.is_dir()]
    if not found:
        yield f"{folder}: nothing to prune"
    for place in found:
        with lock_stage_folder(place.parent):
            for one in sorted(place.iterdir()):
                size = sum(path.stat().st_size for path in visible_files(one))
                try:
                    remove(one)
                except OSError as error:
                    raise machine_error(error) or error from error
                yield f"{one}: deleted, {size / 1e6:.1f} MB"
            remove(place)
