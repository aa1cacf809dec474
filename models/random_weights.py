"""Made-up weights of true size and scale, for measuring and testing without a checkpoint.

Values do not matter to a decode step's time, their bytes do; so a tensor is a seeded block of 2^18 normal values
laid end to end, not a billion draws. The block's length is prime, hence no two rows of a tensor start at the same place
in it and no two are equal; every tensor draws its own block from (seed, name), but those of the experts of a layer have one
between them, each from another place on. Output projections beside experts are smaller, the more layers there are: what
attention averages is much the same for all tokens, and at full scale they would soon all choose the same experts. The same
seed gives the same bits on every machine and at every thread count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch

from models.config import ModelConfig
from models.errors import UserError
from models.families import PRESETS
from models.quantised import plain_matrices
from models.weights import expected_tensors
from models.zipf import zipf_scales

PREFIX = "random:"
BLOCK_VALUES = 262147  # the first prime above 2^18
MATRIX_SCALE = 0.02  # Hugging Face's `initializer_range` for Llama
EXPERT_SHIFT = 1009  # values from one expert's beginning in the block to the next one's
NORM_SCALE = 0.1  # norm weights are 1 plus this much noise, so that leaving one out shows


@dataclass(frozen=True)
class RandomWeights:
    """A `WeightSource` for any configuration: matrices and biases N(0, 0.02), norm weights N(1, 0.1), in `dtype`; output
    projections beside experts N(0, 0.02 / (2 layers)).

    Routers choose experts evenly, but with `zipf`: then of all choices the r-th expert of a layer has a share that goes as
    r^-zipf (`models.zipf`).  Raises UserError for an exponent that these experts cannot have.
    """

    config: ModelConfig
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    zipf: float = 0.0

    def __post_init__(self) -> None:
        if self.zipf:
            zipf_scales(self.config.num_experts, self.config.experts_per_token, self.zipf)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`."""
        drawn: dict[str, torch.Tensor] = {}  # blocks of the experts at hand, twice each: any place in one begins a whole
        routers = plain_matrices(self.config) if self.zipf else set()
        for name, shape in expected_tensors(self.config).items():
            count = int(np.prod(shape))
            common, expert = _without_expert(name)
            if expert is None:
                drawn.clear()
                block = self._block(name, count)
            else:
                if common not in drawn:
                    drawn[common] = self._block(common, count).repeat(2)
                length = len(drawn[common]) // 2
                start = EXPERT_SHIFT * expert % length
                block = drawn[common][start : start + length]
            values = _lay_end_to_end(block, count).view(shape)
            yield name, self._skewed(values) if name in routers else values

    def _skewed(self, router: torch.Tensor) -> torch.Tensor:
        """A router [experts, hidden] that chooses by Zipf's law."""
        scales = zipf_scales(len(router), self.config.experts_per_token, self.zipf)
        return (router.float() * torch.tensor(scales)[:, None]).to(router.dtype)

    def _block(self, name: str, count: int) -> torch.Tensor:
        generator = np.random.Generator(np.random.PCG64([self.seed, crc32(name.encode())]))
        block = torch.from_numpy(generator.standard_normal(min(count, BLOCK_VALUES), dtype=np.float32))
        values = (1 + NORM_SCALE * block) if name.endswith("norm.weight") else MATRIX_SCALE * block
        if self.config.num_experts and name.endswith("o_proj.weight"):
            values /= 2 * self.config.num_layers
        return values.to(self.dtype)


def random_config(model: str) -> ModelConfig:
    """The preset that `random:<preset>` names. Raises `UserError` for any other name."""
    preset = model.removeprefix(PREFIX)
    if preset not in PRESETS:
        raise UserError(f"{model}: no such preset, choose one of {', '.join(PREFIX + name for name in PRESETS)}")
    return PRESETS[preset]


def _without_expert(name: str) -> tuple[str, int | None]:
    """A tensor's name without the number of its expert, and that number; None where it is of none."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return (name, None) if found is None else (name.replace(found[0], ".experts."), int(found[1]))


def _lay_end_to_end(block: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` values of endless repetitions of a block."""
    values = np.resize(block.view(torch.uint8).numpy(), count * block.itemsize)  # as bytes: NumPy has no bfloat16
    return torch.from_numpy(values).view(block.dtype)
