"""Predict the time of a program with no GPU: `simulate(program, past)`.  The model is stated in docs/scheduler.md."""

from scheduler.simulate.engine import run_jobs
from scheduler.simulate.jobs import Job, Jobs, jobs_of
from scheduler.simulate.result import Simulation, simulate

__all__ = ["Job", "Jobs", "Simulation", "jobs_of", "run_jobs", "simulate"]
