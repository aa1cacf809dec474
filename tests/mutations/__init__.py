"""Planted faults for the schedule checker: `python -m tests.mutations` runs the full campaign."""
