"""`lorry-infer`: test samples to answers."""

from entrypoints.common import stage_command

main = stage_command("infer", "Answer the test samples with base and every adapter.")

if __name__ == "__main__":
    main()
