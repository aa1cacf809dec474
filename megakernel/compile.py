"""Compile the kernel for Hopper with no GPU, and say what it needs: registers, stack, spills, shared memory.

    python -m megakernel.compile --model llama-3.2-1b

prints that as JSON, for the Triton that is installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from megakernel.device.kernel import RUNTIME_ARGUMENTS, megakernel
from megakernel.geometry import Geometry, beside_box, make_geometry
from megakernel.options import BESIDE_LAYOUT, OPTIONS, TMA_LAYOUT, WARPS, Sizes
from models.command import Parser, add_formats, add_model, columns, command, start
from models.errors import UserError
from models.formats import chosen_formats
from scheduler.buckets import BucketPrograms
from scheduler.options import cache_capacity, find_config

POINTERS = {
    "weights": "*bf16",
    "cache_rows": "*bf16",
    "activations": "*fp32",
    "constants": "*fp32",
    "rope": "*fp32",
    "hidden_state": "*fp32",
    "words": "*i32",
    "starts": "*i32",
    "uses": "*i32",
    "counters": "*i32",
    "tokens_buffer": "*i32",
    "control": "*i32",
    "stamps": "*i64",
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs, per thread (registers, bytes of stack and local memory) and per block (bytes)."""

    registers: int
    stack: int
    local: int
    shared: int


BESIDE = ("beside", "head_beside")
OPTIONAL = ("halves", *BESIDE)  # descriptors that are None where there is no need of them


def beside_types(geometry: Geometry) -> dict[str, str]:
    """The types of the descriptors of what lies beside pages."""
    words = (geometry.qkv.format.scale_words, geometry.head.format.scale_words if geometry.head_apart else 0)
    types = [f"tensordesc<fp32{beside_box(count)},{BESIDE_LAYOUT!r}>" if count else "constexpr" for count in words]
    return dict(zip(BESIDE, types, strict=True))


def compile_for_hopper(geometry: Geometry, **options: Any) -> Any:
    """The compiled kernel for compute capability 9.0; `options` are Triton's own, beside those that every launch uses."""
    descriptor, half = (f"tensordesc<bf16[{lines}, 64],{TMA_LAYOUT!r}>" for lines in (128, 64))
    halves = half if geometry.experts.down_halved else "constexpr"
    signature = {"tape": descriptor, "halves": halves, "cache": descriptor, **beside_types(geometry), **POINTERS}
    signature |= {name: "i64" if name == "patience" else "i32" for name in RUNTIME_ARGUMENTS}
    signature["S"] = "constexpr"
    constants: dict[tuple[int, ...], Any] = {(megakernel.arg_names.index("S"),): Sizes(geometry)}
    constants |= {
        (i,): None for i, name in enumerate(megakernel.arg_names) if name in OPTIONAL and signature[name] == "constexpr"
    }
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(megakernel.arg_names) if name in POINTERS}
    source = GluonASTSource(fn=megakernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS, **OPTIONS, **options})


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


def describe(geometry: Geometry, **options: Any) -> dict[str, Any]:
    """Compile and report, as JSON-ready values: the fields of `Resources`, Triton's version, seconds."""
    begun = time.perf_counter()
    kernel = compile_for_hopper(geometry, **options)
    seconds = round(time.perf_counter() - begun, 1)
    return {"triton": triton.__version__, **asdict(resources(kernel)), "seconds": seconds}


@command
def main(arguments: list[str] | None = None) -> int:
    """Exit 0, or 2 with one line where no program can be made."""
    parser = Parser(prog="python -m megakernel.compile", description="Compile the kernel; no GPU is needed.")
    add_model(parser, required=True)
    add_formats(parser)
    parser.add_argument("--sms", type=int, default=132, help="streaming multiprocessors (default %(default)s)")
    parser.add_argument("--capacity", type=int, help="positions of the KV cache (default 2048, or the model's)")
    parser.add_argument("--past", type=int, default=0, help="the position whose program is compiled (default %(default)s)")
    parser.add_argument("--columns", type=columns, default=(1, 1), help="SxD: S sequences, or D columns of one (default 1x1)")
    options = parser.parse_args(arguments)
    config = find_config(options.model)
    capacity = cache_capacity(config, min(2048, config.max_position) if options.capacity is None else options.capacity)
    formats = chosen_formats(options.weights, options.head)
    sequences, depth = options.columns
    programs = BucketPrograms(config, options.sms, capacity, itemsize=2, formats=formats, sequences=sequences, depth=depth)
    if not 0 <= options.past <= capacity:
        raise UserError(f"position {options.past} in a KV cache of {capacity}: use 0 to {capacity}")
    program = programs.program(programs.place(options.past))
    geometry = make_geometry(program)
    made = {"model": options.model, "sms": options.sms, "columns": [sequences, depth], "slices": program.shape.slices}
    print(json.dumps({**made, **describe(geometry)}))
    return 0


if __name__ == "__main__":
    start(main)
