"""What the GPU tests share: models that take seconds to load or compile are made once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.rig import Rig, device_sms
from megakernel.engine import Engine
from models.packed import pack
from tests.support.gpu_models import config_of, weights_of
from tests.support.preparation import (
    CASES,
    EXPERT_PRESETS,
    PRESET_CASES,
    Preparation,
    engine_programs,
    oversized_programs,
    programs_of,
    sm_count_programs,
)

CAPACITY = config_of("bundled").max_position  # of the engine: two context buckets


@pytest.fixture(scope="session")
def preparation() -> Iterator[Preparation]:
    """Kernels that later tests need are compiled in the background while the tests that ask for this one run."""
    sms = device_sms()
    later = {"engine": (engine_programs(sms), [0, CAPACITY - 1]), "too many SMs": (oversized_programs(sms), [0])}
    later |= {f"{count} SMs": (programs, [0]) for count, programs in sm_count_programs(sms).items()}
    presets = {**PRESET_CASES, **EXPERT_PRESETS}
    later |= {name: (programs_of(case, sms), [0, case.positions - 1]) for name, case in presets.items()}
    prepared = Preparation(sms, later)
    yield prepared
    prepared.close()


@pytest.fixture(scope="session")
def bundled_rig() -> Rig:
    """The bundled model, below the engine, with buckets of one and of two KV pages."""
    case = CASES["bundled"]
    model = pack(weights_of(case.name), config_of(case.name), torch.bfloat16, case.capacity)
    return Rig(model, programs_of(case, device_sms()))


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The bundled model in the product's engine."""
    with made_engine(prefill=True) as made:
        yield made


@pytest.fixture(scope="session")
def decoder() -> Iterator[Engine]:
    """The bundled model in an engine that decodes prompts token by token."""
    with made_engine(prefill=False) as made:
        yield made


def made_engine(prefill: bool, device: int = 0) -> Engine:
    """The bundled model on a GPU."""
    from megakernel.gpu.backend import CHUNK, GpuBackend
    from megakernel.prefill.prefill import Prefill

    model = pack(weights_of("bundled"), config_of("bundled"), torch.bfloat16, CAPACITY)
    programs = engine_programs(device_sms())
    return Engine(GpuBackend(model, programs, torch.device("cuda", device), Prefill if prefill else None), chunk=CHUNK)
