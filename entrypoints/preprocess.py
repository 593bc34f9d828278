"""The command `lorry-preprocess`."""

from collections.abc import Callable

from entrypoints.common import stage_command


def _work() -> Callable[..., None]:
    from stages.preprocess.stage import work

    return work


main = stage_command("preprocess", "Turn documents and questions into samples.", _work)

if __name__ == "__main__":
    main()
