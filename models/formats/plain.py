"""Weights as numbers of the activations' own type: bf16, and fp32 on the CPU machine."""

from __future__ import annotations

from models.formats.base import WeightFormat

BF16 = WeightFormat("bf16", columns=512)
FP32 = WeightFormat("fp32", columns=256)
