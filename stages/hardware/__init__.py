"""What the machine is and what fits it: targets, probe, precision, batch plan. No heavy imports."""
