"""Compile the kernel of a model in a process of its own, under a Triton of choice, from its geometry alone."""

from __future__ import annotations

import functools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megakernel.geometry import Geometry, make_geometry
from megakernel.prefill.plan import Plan
from models.config import ModelConfig
from models.families import PRESETS
from models.formats import PLAIN, Formats
from models.hf_config import read_config
from scheduler.build import build_program, make_shape
from tests.support import BUNDLED, ROOT

OLDEST, NEWEST = "3.6.0", "3.9.0"  # Triton versions
SMS = 132  # of an H100 or H200
CAPACITY = 2048
MODELS = {**PRESETS, "bundled": read_config(BUNDLED)}
CHILD = """
import json, pickle, sys
from megakernel.compile import describe
geometry, options = json.load(sys.stdin)
print(json.dumps(describe(pickle.loads(bytes.fromhex(geometry)), **options)))
"""

PREFILL_CHILD = """
import json, pickle, sys
from megakernel.prefill.compile import describe
print(json.dumps(describe(*pickle.loads(bytes.fromhex(json.load(sys.stdin))))))
"""


@functools.cache
def geometry_of(config: ModelConfig, sms: int = SMS, formats: Formats = PLAIN) -> Geometry:
    """The geometry of a model's programs: every bucket and every number of slices has the same."""
    capacity = min(CAPACITY, config.max_position)
    shape = make_shape(config, sms=sms, capacity=capacity, bucket=capacity, formats=formats)
    return make_geometry(build_program(shape, sms))


def compiled(site: Path, geometry: Geometry, **options: Any) -> dict[str, Any]:
    """What `megakernel.compile.describe` says of the kernel under the Triton that lies in the folder `site`."""
    found: dict[str, Any] = asked(site, CHILD, [pickle.dumps(geometry).hex(), options])
    return found


def compiled_prefill(
    site: Path, config: ModelConfig, formats: Formats = PLAIN, only: Collection[str] = ()
) -> list[dict[str, Any]]:
    """What `megakernel.prefill.compile.describe` says of a model's kernels, or of some, under the Triton in a folder."""
    plan = Plan(config, SMS, min(CAPACITY, config.max_position), formats)
    request = pickle.dumps((geometry_of(config, formats=formats), plan, only)).hex()
    found: list[dict[str, Any]] = asked(site, PREFILL_CHILD, request)
    return found


def asked(site: Path, program: str, request: Any) -> Any:
    """What a program of its own answers to a request, both of them JSON, with the Triton in the folder `site`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command, request = [sys.executable, "-c", program], json.dumps(request)
    done = subprocess.run(command, input=request, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
