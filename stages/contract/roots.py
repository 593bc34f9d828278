"""The three mounts: `/data` and `/models` (read-only), and `/runs`, where stages write their results.

Without containers they are the folders that LORRY_DATA, LORRY_MODELS and LORRY_RUNS name.
"""

import os
from dataclasses import dataclass
from pathlib import Path


def data_folder(mount: Path, path: str) -> Path:
    """The folder that a recipe's `data.path` names, on this data mount.

    In a container that `lorry launch --data FOLDER` starts, the mount is that folder itself: LORRY_DATA_FROM then has
    the folder's path on the host, which is also the recipe's `data.path`, as without containers.
    """
    return mount if path == os.environ.get("LORRY_DATA_FROM") else mount / path


@dataclass(frozen=True)
class Roots:
    """The folders of the three mounts, as absolute paths."""

    data: Path
    models: Path
    runs: Path

    @staticmethod
    def from_environment() -> "Roots":
        """The folders that LORRY_DATA, LORRY_MODELS and LORRY_RUNS name.

        Defaults, below the current folder: recipes/data, models and runs.
        """
        return Roots(
            data=Path(os.environ.get("LORRY_DATA", "recipes/data")).absolute(),
            models=Path(os.environ.get("LORRY_MODELS", "models")).absolute(),
            runs=Path(os.environ.get("LORRY_RUNS", "runs")).absolute(),
        )
