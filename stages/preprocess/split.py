"""Split samples by group (a document), never by row, so that nothing trained on is scored."""

import hashlib
import math

from stages.contract.errors import DataError
from stages.contract.recipe import Data

SPLITS = ("train", "validation", "test")


def split_groups(groups: set[str], given: dict[str, str | None], data: Data, seed: int) -> dict[str, str]:
    """The split of each group. `given` names the groups whose split (`train` or `test`) the data themselves state.

    Otherwise groups are put in an order drawn from the seed and their names, so that a group's place does not hang on
    how the others are listed. Raises DataError where a group is left for only one of train and test.
    """
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).hexdigest())
    free = [group for group in order if given.get(group) != "test"]
    if any(given.get(group) for group in groups):
        test = [group for group in order if given.get(group) == "test"]
    else:
        count = min(max(math.ceil(len(order) * data.test_fraction), 1), len(order) - 1) if data.test_fraction else 0
        test, free = order[:count], order[count:]
    count = min(max(round(len(free) * data.validation_fraction), 1), len(free) - 1) if data.validation_fraction else 0
    validation, train = free[:count], free[count:]
    if not train or not test:
        raise DataError(
            f"found questions on {len(groups)} document(s): {len(train)} to train on and {len(test)} to test on;"
            " splits are by document, so both need at least one"
        )
    named = {"train": train, "validation": validation, "test": test}
    return {group: split for split, members in named.items() for group in members}
