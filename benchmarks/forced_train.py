"""`lorry-train` with the sharding that FORCED_SHARDING names, for `benchmarks.zero`.

It stands for what a plan chooses by itself on other cards: named in the recipe, a change of it would begin the training
anew.
"""

import os
from typing import Any

import stages.train.stage
from entrypoints.train import main
from stages.hardware.fit import Way, plan_training
from stages.hardware.shape import ModelShape


def _planned(shape: ModelShape, settings: Any, *others: Any) -> Way:
    return plan_training(shape, settings.model_copy(update={"sharding": os.environ["FORCED_SHARDING"]}), *others)


if __name__ == "__main__":
    vars(stages.train.stage)["plan_training"] = _planned
    main()
