"""The command `lorry-preprocess`."""

from collections.abc import Callable

from entrypoints.common import stage_command


def _work() -> Callable[..., None]:
    from stages.hardware.pick import hide_denied_cards
    from stages.preprocess.stage import work

    hide_denied_cards(needs_one=False)
    return work


main = stage_command("preprocess", "Turn documents and questions into samples.", _work)

if __name__ == "__main__":
    main()
