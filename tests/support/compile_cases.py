"""Compile the kernel of a model in a process of its own, under a Triton of choice, from its geometry alone."""

from __future__ import annotations

import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from megakernel.geometry import Geometry, make_geometry
from models.config import ModelConfig
from models.families import PRESETS
from models.hf_config import read_config
from scheduler.build import build_program, make_shape
from tests.support import BUNDLED, ROOT

SMS = 132  # of an H100 or H200
CAPACITY = 2048
MODELS = {**PRESETS, "bundled": read_config(BUNDLED)}
CHILD = """
import json, pickle, sys
from megakernel.compile import describe
geometry, options = json.load(sys.stdin)
print(json.dumps(describe(pickle.loads(bytes.fromhex(geometry)), **options)))
"""


@functools.cache
def geometry_of(config: ModelConfig, sms: int = SMS) -> Geometry:
    """The geometry of a model's programs: every bucket and every number of slices has the same."""
    capacity = min(CAPACITY, config.max_position)
    shape = make_shape(config, sms=sms, capacity=capacity, bucket=capacity)
    return make_geometry(build_program(shape, sms))


def compiled(site: Path, geometry: Geometry, **options: Any) -> dict[str, Any]:
    """What `megakernel.compile.describe` says of the kernel under the Triton that lies in the folder `site`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    request = json.dumps([pickle.dumps(geometry).hex(), options])
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=request, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
