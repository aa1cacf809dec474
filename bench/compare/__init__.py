"""The same checkpoint, prompts and stopwatch for every engine that a user would pick; see docs/comparison.md."""
