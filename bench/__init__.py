"""Benchmarks: each prints its figures against the ceiling that bounds them, and ends with one line of JSON."""

from models.process import begin_as_module

begin_as_module()
