"""The command `lorry-infer`."""

from collections.abc import Callable

from entrypoints.common import stage_command


def _work() -> Callable[..., None]:
    from stages.hardware.pick import hide_denied_cards
    from stages.infer.stage import work

    hide_denied_cards()
    return work


main = stage_command("infer", "Answer the test samples with the base model and every adapter.", _work)

if __name__ == "__main__":
    main()
