"""What produces every figure in the README. Each module here is a command that writes one file in results/."""
