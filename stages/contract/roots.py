"""The three mounts: `/data` and `/models` (read-only), and `/runs`, where stages write their results.

Without containers they are the folders that LORRY_DATA, LORRY_MODELS and LORRY_RUNS name.
"""

import os
from dataclasses import dataclass
from pathlib import Path


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
