"""Runs the work of a stage. It imports the stage only when it runs it, as that takes seconds."""

import importlib

from stages.contract.stage import Stage
from stages.hardware.pick import hide_unusable_gpus
from stages.host.needs import stages_on_gpus


def run_work(stage: Stage) -> None:
    """Run `work` of `stages.<stage>.stage`, on the GPUs that it may use.

    A stop ends it at once, as all that is finished is on the disk; only training processes save first. Raises the
    errors of `hide_unusable_gpus`, and what the work raises.
    """
    if stage.name != "eval":
        for line in hide_unusable_gpus(needs_one=bool(stages_on_gpus(stage.run, [stage.name]))):
            stage.events.say(line)
    with stage.stop.waiting(False):
        importlib.import_module(f"stages.{stage.name}.stage").work(stage)
