"""The scheduler's own errors: a model or a request it cannot make a program for, and a program it cannot read."""

from __future__ import annotations

from models.errors import UserError


class ScheduleError(UserError):
    """No valid program can be made; the message names what is wrong and the mend."""


class ProgramFormatError(UserError):
    """A saved program cannot be read; the message names the file and the mend."""
