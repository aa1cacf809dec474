"""Weights come to their places by name, are what the tape holds, and are refused in the same words."""

from __future__ import annotations

import pytest
import torch

from megakernel.torch.weights import NamedTensors, Weights
from models.errors import UserError
from models.packed import pack
from models.packing import unpack
from models.random_weights import RandomWeights
from models.weights import Weights as HostWeights
from models.weights import expected_tensors
from tests.support.configs import SMALL_CONFIGS, random_tensors, small_config

CPU = torch.device("cpu")


class Recorded(NamedTensors):
    """Remembers the last one that was made."""

    last: NamedTensors

    def fill(self, source: object) -> None:
        Recorded.last = self
        super().fill(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SMALL_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tensor_is_that_of_the_tape(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakernel.torch.weights.NamedTensors", Recorded)
    monkeypatch.setattr("megakernel.torch.weights.CHUNK_ELEMENTS", 1000)
    config = small_config(name)
    Weights(config, dtype, CPU, RandomWeights(config))
    packed = pack(RandomWeights(config), config, dtype)
    expected = unpack(packed.tape, packed.weights, packed.constants)
    assert Recorded.last.places.keys() == expected.keys() == expected_tensors(config).keys()
    for key, place in Recorded.last.places.items():
        assert place.dtype == (dtype if place.ndim == 2 else torch.float32)
        assert torch.equal(place, expected[key]), key


def test_a_matrix_with_a_bias_on_some_of_its_modules_has_zeros_for_the_others() -> None:
    config = small_config("attention_bias")
    tensors = NamedTensors(config, torch.float32, CPU)
    module = "model.layers.0.self_attn"
    del tensors.shapes[f"{module}.q_proj.bias"]
    bias = tensors.linear(f"{module}.q_proj", f"{module}.k_proj").bias
    assert bias is not None
    tensors.places[f"{module}.k_proj.bias"].fill_(3.0)
    queries = config.num_heads * config.head_dim
    assert torch.equal(bias[:queries], torch.zeros(queries)) and bool((bias[queries:] == 3.0).all())


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (torch.nan, torch.float32, r"up_proj.weight holds nan at \[40, 3\]: weights must be finite"),
        (3.4e38, torch.bfloat16, r"up_proj.weight holds 3.4e\+38 at \[40, 3\], too large for bfloat16"),
    ],
)
def test_a_weight_that_is_no_finite_number_as_kept(value: float, dtype: torch.dtype, message: str) -> None:
    config = small_config("gqa2")
    tensors = random_tensors(config, seed=5)
    tensors["model.layers.1.mlp.up_proj.weight"][40, 3] = value
    with pytest.raises(UserError, match=message):
        Weights(config, dtype, CPU, HostWeights(tensors))


def test_a_source_that_lacks_a_tensor() -> None:
    config = small_config("gqa2")
    tensors = random_tensors(config, seed=5)
    del tensors["model.norm.weight"]
    with pytest.raises(UserError, match="tensor model.norm.weight is missing"):
        Weights(config, torch.float32, CPU, HostWeights(tensors))
