"""Facts about this machine and what fits it: targets, probe, precision, batch plan, memory. No heavy imports."""
