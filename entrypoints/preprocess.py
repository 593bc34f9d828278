"""The command `lorry-preprocess`."""

from entrypoints.common import stage_command

main = stage_command("preprocess", "Turn documents and questions into samples.")

if __name__ == "__main__":
    main()
