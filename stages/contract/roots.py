"""The three mounts: `/data` and `/models` (read-only), and `/runs`, where stages write their results.

Without containers they are the folders that LORRY_DATA, LORRY_MODELS and LORRY_RUNS name, or those of the checkout.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from stages.contract.errors import UsageError

CHECKOUT = Path(__file__).parents[2]
"""The folder that holds this code and the recipes."""


def data_path(mount: Path, path: str) -> Path:
    """The folder or file that a recipe's `data.path` names, on this data mount.

    In a container that `lorry launch --data PATH` starts, the mount is that folder itself, or the folder of that file:
    LORRY_DATA_FROM then has the mounted folder's path on the host. The recipe's `data.path` is a path on the host, as
    without containers.
    """
    mounted = os.environ.get("LORRY_DATA_FROM")
    if mounted and Path(path).is_relative_to(mounted):
        return mount / Path(path).relative_to(mounted)
    return mount / path


@dataclass(frozen=True)
class Roots:
    """The folders of the three mounts, as absolute paths."""

    data: Path
    models: Path
    runs: Path

    @staticmethod
    def from_environment() -> "Roots":
        """The folders that LORRY_DATA, LORRY_MODELS and LORRY_RUNS name, relative to the current folder. They need not
        exist.

        Defaults, in the checkout, whatever the current folder is: recipes/data, models and runs. Without a checkout, as
        after `pip install` of a wheel, they are in the current folder. An empty variable counts as not set. Raises
        UsageError if a path is something other than a folder, or leads through a file.
        """
        home = CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path()
        return Roots(
            data=_mount("LORRY_DATA", home / "recipes" / "data"),
            models=_mount("LORRY_MODELS", home / "models"),
            runs=_mount("LORRY_RUNS", home / "runs"),
        )

    def refuse_missing_runs(self) -> None:
        """Raise UsageError if the runs folder and the folder above it are missing, as when its disk is not mounted."""
        if not self.runs.exists() and not self.runs.parent.exists():
            raise UsageError(
                f"{self.runs}: no such folder, and no {self.runs.parent} to create it in; create {self.runs.parent}, or"
                " set LORRY_RUNS to another folder"
            )

    def refuse_unwritable_runs(self) -> None:
        """Raise UsageError as `refuse_missing_runs` does, and OSError (`machine_error` explains it) if this process
        can neither write to the runs folder nor create it."""
        self.refuse_missing_runs()
        place = self.runs if self.runs.exists() else self.runs.parent
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(place))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def _mount(variable: str, default: Path) -> Path:
    """The path that an environment variable names, absolute; `default` if the variable is unset or empty.

    Raises UsageError as `Roots.from_environment` does.
    """
    path = Path(os.environ.get(variable) or default).absolute()
    refuse_other_than_folder(path, f"set {variable} to a folder")
    return path


def refuse_other_than_folder(path: Path, cure: str) -> None:
    """Raise UsageError if a path is a file, a link to nothing, or leads through one. `cure` ends the message."""
    for place in reversed([path, *path.parents]):
        if not place.is_symlink() and not place.exists():
            return
        if not place.exists():
            raise UsageError(f"{place}: a link to nothing ({place.readlink()}), not a folder; mend the link, or {cure}")
        if not place.is_dir():
            raise UsageError(f"{place}: a file, not a folder; {cure}")
