"""Faults: what breaks a run, tried on purpose. `make faults` runs them all and writes docs/results/faults.md."""
