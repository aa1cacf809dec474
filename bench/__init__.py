"""Benchmarks: each prints its figures against the ceiling that bounds them, and ends with one line of JSON."""
