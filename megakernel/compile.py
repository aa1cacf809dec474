"""Compile the kernel for Hopper with no GPU, and say what it needs: registers, stack, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from megakernel.device.context import Sizes
from megakernel.device.kernel import RUNTIME_ARGUMENTS, WARPS, megakernel
from megakernel.geometry import Geometry

POINTERS = {
    "weights": "*bf16",
    "cache_rows": "*bf16",
    "activations": "*fp32",
    "constants": "*fp32",
    "rope": "*fp32",
    "words": "*i32",
    "starts": "*i32",
    "targets": "*i32",
    "uses": "*i32",
    "counters": "*i32",
    "tokens_buffer": "*i32",
    "control": "*i32",
    "stamps": "*i64",
}
PAGE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs, per thread (registers, bytes of stack and local memory) and per block (bytes)."""

    registers: int
    stack: int
    local: int
    shared: int


def compile_for_hopper(geometry: Geometry) -> Any:
    """The compiled kernel for compute capability 9.0."""
    descriptor = f"tensordesc<bf16[128, 64],{PAGE_LAYOUT!r}>"
    signature = {"tape": descriptor, "cache": descriptor, **POINTERS}
    signature |= {name: "i64" if name == "patience" else "i32" for name in RUNTIME_ARGUMENTS}
    signature["S"] = "constexpr"
    constants = {(megakernel.arg_names.index("S"),): Sizes(geometry)}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(megakernel.arg_names) if name in POINTERS}
    source = GluonASTSource(fn=megakernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})


def resources(kernel: Any) -> Resources:
    """Read the resource usage from the compiled kernel's binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"], kernel.metadata.shared)


def describe(geometry: Geometry) -> dict[str, Any]:
    """Compile and report, as JSON-ready values."""
    return asdict(resources(compile_for_hopper(geometry)))
