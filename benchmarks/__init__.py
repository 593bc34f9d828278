"""What produces every figure in the docs. Each module here is a command that writes one file in results/."""
