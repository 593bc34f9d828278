"""The three mounts: `/data` and `/models` (read-only), and `/runs`, where stages write their results.

Without containers they are the folders that LORRY_DATA, LORRY_MODELS and LORRY_RUNS name, or those of the checkout.
"""

import os
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
"""The folder that holds this code and the recipes."""


@dataclass(frozen=True)
class Roots:
    """The folders of the three mounts, as absolute paths."""

    data: Path
    models: Path
    runs: Path

    @staticmethod
    def from_environment() -> "Roots":
        """The folders that LORRY_DATA, LORRY_MODELS and LORRY_RUNS name, relative to the current folder.

        Defaults, in the checkout, whatever the current folder is: recipes/data, models and runs. Without a checkout, as
        after `pip install` of a wheel, they are in the current folder. An empty variable counts as not set.
        """
        home = CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path()
        return Roots(
            data=Path(os.environ.get("LORRY_DATA") or home / "recipes" / "data").absolute(),
            models=Path(os.environ.get("LORRY_MODELS") or home / "models").absolute(),
            runs=Path(os.environ.get("LORRY_RUNS") or home / "runs").absolute(),
        )
