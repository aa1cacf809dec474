"""The engines that are compared, and how a user names others: `package.module:Class` is an adapter of one's own.

Knows no engine's library: adapters are imported in their engine's own process (`bench.compare.worker`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.errors import UserError

ADAPTERS = "bench.compare.adapters"
ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
BASELINE = "transformers-eager"  # whose error against fp32 every other engine's is held against

_ADAPTER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class EngineSpec:
    """One engine.

    adapter: "module:Class".  settings: what its constructor is given, by name; JSON can hold the values.  requires: modules
    that must be importable in its Python; `install` is the command that makes them so.  packages: distributions whose versions
    are recorded.  slow_start: starting takes a minute or more, so that `--quick` leaves it out.  python, site: its interpreter,
    and what stands first on its PYTHONPATH.
    """

    name: str
    adapter: str
    label: str
    requires: tuple[str, ...] = ()
    install: str = ""
    packages: tuple[str, ...] = ("torch", "triton")
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    slow_start: bool = False
    python: str = sys.executable
    site: str = ""


_TORCH = "pip install torch"
_TRANSFORMERS = "pip install torch transformers"
_OURS = EngineSpec("megakernel", f"{ADAPTERS}.ours:Megakernel", "megakernel (this project)", ("torch",), _TORCH)
_VLLM = EngineSpec(
    "vllm",
    f"{ADAPTERS}.vllm_engine:Vllm",
    "vLLM",
    ("vllm",),
    "python3 -m venv vllm && vllm/bin/pip install vllm, then --engine vllm=vllm/bin/python",
    ("torch", "triton", "transformers", "vllm", "flashinfer-python"),
    # the engine core in the same process: one hop less for every token
    {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"},
    slow_start=True,
)
REGISTRY: tuple[EngineSpec, ...] = (
    _OURS,
    # quantised on the host while they are read, which takes a minute
    replace(_OURS, name="megakernel-fp8", label="megakernel, weights in fp8", settings={"weights": "fp8"}, slow_start=True),
    replace(_OURS, name="megakernel-int4", label="megakernel, weights in int4", settings={"weights": "int4"}, slow_start=True),
    EngineSpec(
        BASELINE,
        f"{ADAPTERS}.transformers_eager:TransformersEager",
        "transformers, eager",
        ("torch", "transformers"),
        _TRANSFORMERS,
        ("torch", "transformers"),
    ),
    EngineSpec(
        "transformers-compiled",
        f"{ADAPTERS}.transformers_compiled:TransformersCompiled",
        "transformers, static cache + torch.compile",
        ("torch", "transformers"),
        _TRANSFORMERS,
        ("torch", "triton", "transformers"),
        slow_start=True,
    ),
    EngineSpec("cuda-graph", f"{ADAPTERS}.cuda_graph:CudaGraph", "PyTorch + CUDA graph", ("torch",), _TORCH),
    EngineSpec(
        "cuda-graph-compiled",
        f"{ADAPTERS}.cuda_graph:CompiledCudaGraph",
        "PyTorch + torch.compile + CUDA graph",
        ("torch",),
        _TORCH,
        slow_start=True,
    ),
    _VLLM,
    replace(
        _VLLM,
        name="vllm-fp8",
        label="vLLM, fp8",
        install=_VLLM.install.replace("--engine vllm=", "--engine vllm-fp8="),
        settings={"quantization": "fp8"},
    ),
    EngineSpec(
        "sglang",
        f"{ADAPTERS}.sglang_engine:Sglang",
        "SGLang",
        ("sglang",),
        "python3 -m venv sglang && sglang/bin/pip install sglang, then --engine sglang=sglang/bin/python",
        ("torch", "triton", "transformers", "sglang", "sglang-kernel", "flashinfer-python"),
        slow_start=True,
    ),
)


def select(names: str | None, pythons: list[str], quick: bool) -> list[EngineSpec]:
    """The engines to run, in the order given or of the registry.

    names: comma-separated names and "module:Class" adapters; None: all of the registry, with `quick` all that start fast.
    pythons: "NAME=PYTHON" or "NAME=PYTHON:PATH..." (paths that stand first on the engine's PYTHONPATH); one that is not
    among the names is added.  Raises UserError for what is unknown.
    """
    known = {spec.name: spec for spec in REGISTRY}
    if names is None:
        chosen = [spec.name for spec in REGISTRY if not (quick and spec.slow_start)]
    else:
        chosen = [name.strip() for name in names.split(",") if name.strip()]
    interpreters = dict(split_python(entry) for entry in pythons)
    chosen += [name for name in interpreters if name not in chosen]
    specs = []
    for name in dict.fromkeys(chosen):
        spec = known.get(name)
        if spec is None:
            if not _ADAPTER.fullmatch(name):
                raise UserError(f"unknown engine {name!r}: choose among {', '.join(known)}, or give module:Class")
            spec = EngineSpec(name, name, name)
        python, site = interpreters.get(name, (spec.python, ""))
        specs.append(EngineSpec(**{**vars(spec), "python": python, "site": site}))
    if not specs:
        raise UserError(f"no engine to run: choose among {', '.join(known)}")
    return specs


def split_python(entry: str, option: str = "--engine") -> tuple[str, tuple[str, str]]:
    """(name, (interpreter, extra PYTHONPATH)) of "NAME=PYTHON[:PATH...]"; the name may itself hold one colon."""
    name, equals, value = entry.partition("=")
    python, _, site = value.partition(":")
    if not (name and equals and python):
        raise UserError(f"{option} {entry}: write NAME=PYTHON or NAME=PYTHON:PATH")
    paths = [os.path.abspath(path) for path in site.split(":") if path]
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"{option} {entry}: {path} is no directory, give the folder that holds the packages")
    return name, (find_python(python), os.pathsep.join(paths))


def find_python(python: str) -> str:
    """Absolute path of an interpreter, its links unresolved: a virtual environment is known by the link's place."""
    found = shutil.which(python)
    return os.path.abspath(found) if found else python


def worker_command(spec: EngineSpec) -> list[str]:
    """What starts an engine's process."""
    lists = [",".join(spec.requires), ",".join(spec.packages)]
    return [spec.python, "-m", "bench.compare.worker", spec.adapter, json.dumps(spec.settings), *lists]


def worker_environment(spec: EngineSpec) -> dict[str, str]:
    """The environment of an engine's process: its own packages first, then this project, and no network."""
    paths = [spec.site, str(ROOT), os.environ.get("PYTHONPATH", "")]
    settings = {**os.environ, **OFFLINE, **spec.environment, "PYTHONUNBUFFERED": "1"}
    settings["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if "CUDA_HOME" not in settings and os.path.isdir("/usr/local/cuda"):
        settings["CUDA_HOME"] = "/usr/local/cuda"
    return settings
