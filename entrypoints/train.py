"""`lorry-train`: samples to adapters."""

from entrypoints.common import stage_command

main = stage_command("train", "Train one adapter for each entry of train.adapters.")

if __name__ == "__main__":
    main()
