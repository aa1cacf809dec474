"""Rotary position embedding: inverse frequencies and the table of cosines and sines, in fp32 exactly as Hugging Face
computes them.

Knows nothing of how queries and keys are laid out, beyond that dimension i turns with dimension i + head_dim / 2.
"""

from __future__ import annotations

import math

import torch

from models.config import ModelConfig, RopeScaling
from models.errors import UserError


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians a position for each pair of dimensions: fp32 [head_dim / 2].

    "default": theta^(-2i / head_dim), RoFormer (arXiv:2104.09864), section 3.2.2; "linear": that divided by the factor,
    which is position interpolation (arXiv:2306.15595). Operation by operation as in `transformers.modeling_rope_utils`.
    Raises `UserError` where fp32 does not hold the angles of every position that the model allows.
    """
    frequencies = _scaled_frequencies(config)
    if not torch.isfinite(frequencies * config.max_position).all():
        raise UserError(
            f"rope_theta {config.rope_theta:g} with {config.rope_scaling.kind} scaling by {config.rope_scaling.factor:g} "
            f"turns position {config.max_position} by more than fp32 holds: take config.json from the same model"
        )
    return frequencies


def _scaled_frequencies(config: ModelConfig) -> torch.Tensor:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling.kind == "linear":
        return frequencies / config.rope_scaling.factor
    if config.rope_scaling.kind == "llama3":
        return _llama3(frequencies, config.rope_scaling)
    return frequencies


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's scaling: short wavelengths stay, long ones are divided by the factor, those between are interpolated.

    Source: `apply_scaling` in Meta's llama-models, `_compute_llama3_parameters` in transformers (whose rounding this
    repeats).
    """
    original = scaling.original_max_position
    wavelength = 2 * math.pi / frequencies
    longest_kept = original / scaling.high_freq_factor
    shortest_divided = original / scaling.low_freq_factor
    scaled = torch.where(wavelength > shortest_divided, frequencies / scaling.factor, frequencies)
    smooth = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_between = ~(wavelength < longest_kept) & ~(wavelength > shortest_divided)
    return torch.where(is_between, between, scaled)


def rope_table(config: ModelConfig, capacity: int) -> torch.Tensor:
    """Cosine and sine for every position below `capacity`: fp32 [capacity, padded_head_dim / 2, 2].

    Pair i of a packed query or key head (`models.tape.paired_head_rows`) reads entry i; pairs of padding get angle 0.
    """
    positions = torch.arange(capacity, dtype=torch.float32)
    angles = torch.zeros(capacity, config.padded_head_dim // 2)
    angles[:, : config.head_dim // 2] = positions[:, None] * inverse_frequencies(config)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)
