"""Plain PyTorch on a GPU: as near to fp32 as on the CPU, the same request on either, its memory within what was computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megakernel.engine import Engine
from megakernel.loading import load_engine
from megakernel.memory import torch_bytes
from megakernel.request import SamplingParams
from megakernel.torch.backend import PASS, TorchBackend
from megakernel.torch.device import best_device, free_bytes
from megakernel.torch.product import gives_fp32
from models.reference import Reference
from tests.gpu.test_gpu_against_vm import rms
from tests.support import BUNDLED
from tests.support.configs import MIXTURES, SMALL_CONFIGS, small_config
from tests.support.gpu_models import random_tokens
from tests.support.torch_models import logits_in_passes, rounded, torch_model

pytestmark = pytest.mark.gpu
POSITIONS = 70
HOT = SamplingParams(temperature=1.2, top_k=40, top_p=0.95, seed=4)


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    yield best_device()
    torch.cuda.empty_cache()


def test_the_device_is_the_gpu(device: torch.device) -> None:
    assert device == torch.device("cuda", torch.cuda.current_device())
    assert free_bytes(device) == pytest.approx(torch.cuda.mem_get_info(device)[0], rel=0.05)
    assert gives_fp32(torch.bfloat16, device)


def largest(errors: torch.Tensor) -> float:
    return errors.abs().max().item()


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) at every position, nats, fp64 [positions]."""
    p, q = (torch.log_softmax(values.double(), -1) for values in (reference, logits))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("size", [POSITIONS, 1, 32])
@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_bf16_is_no_further_from_fp32_than_the_references_bf16(name: str, size: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(SMALL_CONFIGS[name]["vocab_size"], (POSITIONS,), generator=generator).tolist()
    weights = rounded(name, torch.bfloat16)
    exact, theirs = (
        Reference(small_config(name), weights, dtype).logits(tokens).float() for dtype in (torch.float32, torch.bfloat16)
    )
    ours = logits_in_passes(torch_model(name, torch.bfloat16, device), tokens, size)
    assert 0 < divergence(exact, ours).mean() <= divergence(exact, theirs).mean()
    size_of = rms if name in MIXTURES else largest  # the largest are those of a position whose router chose others, in both
    assert size_of(ours - exact) <= size_of(theirs - exact)
    exact = Reference(small_config(name), rounded(name, torch.float32), torch.float32).logits(tokens)
    wide = logits_in_passes(torch_model(name, torch.float32, device), tokens, size)
    assert (wide - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_a_request_repeats_itself_and_is_within_the_memory_computed() -> None:
    with load_engine(BUNDLED, "torch", capacity=512) as engine:
        generate(engine)  # from now on cuBLAS has its workspace
    del engine
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with load_engine(BUNDLED, "torch", capacity=512) as engine:
        backend = engine._backend
        assert isinstance(backend, TorchBackend) and engine.backend_name == "torch"
        runs = [generate(engine) for _ in range(3)]
        assert runs[0] == runs[1] == runs[2] and len(set(runs[0])) > 50
        needs = torch_bytes(engine.config, torch.bfloat16, 512, PASS)
    assert torch.cuda.max_memory_allocated() - before < sum(needs.values())
    del backend
    assert torch.cuda.memory_allocated() - before < 2**20, "the model is gone"


def generate(engine: Engine) -> list[int]:
    return list(engine.generate(random_tokens("bundled", 300), 100, HOT))
