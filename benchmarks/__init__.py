"""The benchmarks behind every figure in the docs, and what they share. README.md lists the commands."""
