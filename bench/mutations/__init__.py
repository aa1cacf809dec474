"""Planted faults for the schedule checker: `python -m bench.mutations` runs the full campaign."""
