"""The benchmarks behind every figure in the docs. Each module is a command that writes one file in results/."""
