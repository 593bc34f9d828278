"""The command `lorry-train`."""

from collections.abc import Callable

from entrypoints.common import stage_command


def _work() -> Callable[..., None]:
    from stages.train.stage import work

    return work


main = stage_command("train", "Tune one adapter for each entry of train.adapters.", _work)

if __name__ == "__main__":
    main()
