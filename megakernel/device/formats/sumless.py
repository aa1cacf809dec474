"""What the twins of formats have in common whose products need no sums of activations."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def stage_sums(S: gl.constexpr, ring, part, values):
    """No sums are needed."""


@gluon.jit
def stage_columns(S: gl.constexpr, ring, page, values):
    """No sums are needed."""


@gluon.jit
def with_staged(S: gl.constexpr, ring, page, x):
    """The operand alone."""
    return x


@gluon.jit
def with_words(x):
    """The operand alone."""
    return x
