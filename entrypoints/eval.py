"""The command `lorry-eval`."""

from collections.abc import Callable

from entrypoints.common import stage_command


def _work() -> Callable[..., None]:
    from stages.eval.stage import work

    return work


main = stage_command("eval", "Score the answers and write the report.", _work)

if __name__ == "__main__":
    main()
