"""The skinny product compiles for sm_90a with no GPU, under the oldest and the newest Triton, as it is meant to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest

from megakernel.gemm.plan import Problem, choose_plan
from tests.support.compile_cases import NEWEST, OLDEST, SMS, asked

Site = Callable[[str], Path]
SHARED = 227 * 1024  # bytes of shared memory that a block may have on Hopper
SPILLED = {4: 128}  # bytes of stack a thread may need outside the loop, by consumers: four have 96 registers a thread
CHILD = """
import json, sys
from megakernel.gemm.compile import describe
from megakernel.gemm.plan import Problem, choose_plan
print(json.dumps([describe(choose_plan(Problem(*problem), sms)) for *problem, sms in json.load(sys.stdin)]))
"""
PROBLEMS = [Problem(tokens, 8192, 8192, wide) for tokens in (8, 16, 32, 64) for wide in (False, True)]


@pytest.mark.parametrize(("version", "problems"), [(OLDEST, PROBLEMS), (NEWEST, PROBLEMS[:1])], ids=[OLDEST, NEWEST])
def test_it_compiles(version: str, problems: list[Problem], triton_site: Site) -> None:
    found = asked(triton_site(version), CHILD, [(*astuple(problem), SMS) for problem in problems])
    assert len(found) == len(problems)
    for problem, each in zip(problems, found, strict=True):
        assert each["triton"] == version
        assert each["shared"] <= SHARED and each["local"] == 0
        assert each["stack"] <= SPILLED.get(choose_plan(problem, SMS).cut.consumers, 0), json.dumps(each)
        kind = "k16.f32.bf16.bf16" if problem.wide else "k32.f32.e4m3.e4m3"
        assert each["instructions"] == [f"wgmma.mma_async.sync.aligned.m64n{problem.padded_tokens}{kind}"]
        assert each["tma"] > 0 and each["slow_conversions"] == 0
