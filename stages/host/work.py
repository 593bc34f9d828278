"""Runs the work of a stage. It imports the stage only when it runs it, as that takes seconds."""

import importlib

from stages.contract.stage import Stage
from stages.hardware.pick import hide_denied_cards
from stages.host.needs import GPU_STAGES


def run_work(stage: Stage) -> None:
    """Run `work` of `stages.<stage>.stage`, on GPUs that LORRY_GPU_DENY does not name.

    A stop ends it at once, as all that is finished is on the disk; only training processes save first. Raises
    UsageError if LORRY_GPU_DENY is wrong, DoesNotFitError if the stage needs a GPU and LORRY_GPU_DENY leaves none, and
    what the work raises.
    """
    if stage.name != "eval":
        hide_denied_cards(needs_one=stage.name in GPU_STAGES)
    with stage.stop.waiting(False):
        importlib.import_module(f"stages.{stage.name}.stage").work(stage)
