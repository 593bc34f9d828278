"""The commands: one for each stage, which the images run, and `lorry` for the host."""
