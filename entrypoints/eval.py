"""`lorry-eval`: answers to scores and a report."""

from entrypoints.common import stage_command

main = stage_command("eval", "Score the answers and write the report.")

if __name__ == "__main__":
    main()
