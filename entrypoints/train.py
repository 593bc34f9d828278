"""The command `lorry-train`."""

from collections.abc import Callable

from entrypoints.common import stage_command


def _work() -> Callable[..., None]:
    from stages.hardware.pick import hide_denied_cards
    from stages.train.stage import work

    hide_denied_cards()
    return work


main = stage_command("train", "Tune one adapter for each entry of train.adapters.", _work)

if __name__ == "__main__":
    main()
