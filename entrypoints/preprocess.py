"""`lorry-preprocess`: documents and questions to samples."""

from entrypoints.common import stage_command

main = stage_command("preprocess", "Turn documents and questions into samples.")

if __name__ == "__main__":
    main()
