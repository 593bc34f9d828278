"""The commands: options and printing only. One for each stage, which its image runs, and `lorry` for the host."""
