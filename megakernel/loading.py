"""From a model's name to an engine: choose the backend, check what it will take, pack the weights.

The only place that knows all backends.  Everything that can be refused is refused before weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from instructions.dimensions import MMA_COLUMNS, next_power_of_two
from megakernel.engine import Engine
from megakernel.errors import one_line
from megakernel.memory import (
    available_bytes,
    check_memory,
    gpu_bytes,
    largest_tensor,
    mend_of,
    packing_bytes,
    torch_bytes,
    vm_bytes,
)
from megakernel.prefill.plan import Plan
from megakernel.torch.backend import PASS, TorchBackend
from megakernel.torch.device import best_device, free_bytes
from megakernel.torch.model import TorchModel
from megakernel.torch.weights import Weights
from megakernel.vm.backend import VmBackend
from models.checkpoint import Checkpoint, open_checkpoint
from models.config import ModelConfig
from models.errors import UserError
from models.formats import PLAIN, Formats, check_formats
from models.packed import pack
from models.quantised import Requantised
from models.tape import PAGE_BYTES
from models.weights import WeightSource, parameter_count
from scheduler.buckets import BucketPrograms
from scheduler.build import COLUMNS, DEFAULT_POLICY, most_depth, most_sequences
from scheduler.options import cache_capacity

BACKENDS = ("auto", "gpu", "torch", "vm")
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DEFAULT_VM_SMS = 4  # enough for every wait to be a wait for another SM; more only cost time
KERNEL_CAPABILITY = (9, 0)

Progress = Callable[[int, int], None]
Stage = Callable[[str], None]


def load_engine(
    model: str | Path,
    backend: str = "auto",
    sms: int | None = None,
    dtype: str = "auto",
    capacity: int | None = None,
    policy: str = DEFAULT_POLICY,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    stage: Stage | None = None,
    weights: str | None = None,
    head: str | None = None,
    speculate: int = 0,
    sequences: int | None = None,
) -> Engine:
    """An engine for a checkpoint directory, a hub id or "random:<preset>".

    backend: "gpu" (the kernel), "torch" (plain PyTorch on the device that it has), "vm" (the CPU machine), or "auto": the
        kernel where there is a GPU that can run it, else PyTorch.
    sms: SMs to schedule for; None: all of the GPU's, 4 on the CPU machine.  PyTorch schedules none.
    dtype: weight type, "bfloat16" or "float32"; "auto" is bfloat16, whatever the checkpoint holds.
    capacity: most tokens of a sequence, prompt and generated ones; None: 4096, or what the model allows if that is less.
    policy: how instructions are placed on SMs, a name in `scheduler.place`.
    progress: called with weights packed so far and weights in all.
    checkpoint: the model, where it has been opened already.
    weights, head: what matrices are kept as, names in `models.formats.NAMES`; weights None: as the checkpoint has them, small
        models in bf16; head None: as the other weights, where those are named.
    speculate: most drafts a step, 0: none; rounded up so that with the token before them they are 2, 4 or 8.
    sequences: most that are decoded at once, up to 8; on the GPU rounded up to 1, 2, 4 or 8, each with a cache of `capacity`.
        None: 1 on the GPU and the CPU machine, 8 in plain PyTorch.
    stage: called with what is done once the weights are packed, where that takes long.

    The engine is ready when this returns: nothing is left to be compiled.

    Raises UserError for anything that cannot be, with the mend; MachineError where the GPU or a compiler fails.
    """
    chosen = choose_backend(backend)
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if checkpoint is None:
        checkpoint = open_checkpoint(model)
    capacity = cache_capacity(checkpoint.config, capacity)
    formats = checkpoint.chosen_formats(weights, head)
    check_formats(formats, DTYPES[dtype].itemsize)
    depth = columns_of(speculate, chosen, checkpoint.config, formats)
    check_sequences(sequences, speculate, chosen)
    numbers = (str(model), checkpoint, DTYPES[dtype], capacity, sms, policy, progress, stage, formats, depth)
    request = LoadRequest(*numbers, sequences=sequences)
    return {"gpu": load_gpu, "torch": load_torch, "vm": load_vm}[chosen](request)


@dataclass(frozen=True)
class LoadRequest:
    """What to load, all checked but for memory and SMs, which depend on the backend."""

    model: str
    checkpoint: Checkpoint
    dtype: torch.dtype
    capacity: int
    sms: int | None
    policy: str
    progress: Progress | None
    stage: Stage | None
    formats: Formats = PLAIN
    depth: int = 1  # columns of the sequence: a token and the drafts after it
    sequences: int | None = None  # most that are decoded at once

    def programs(self, default_sms: int, depth: int = 1, sequences: int = 1) -> BucketPrograms:
        """The programs of this model, of so many columns; raises ScheduleError where none can be made for it."""
        sms = default_sms if self.sms is None else self.sms
        numbers = (self.capacity, self.dtype.itemsize, self.policy, self.formats)
        programs = BucketPrograms(self.checkpoint.config, sms, *numbers, sequences=sequences, depth=depth)
        programs.program(0)
        return programs

    def shared(self, default_sms: int) -> tuple[BucketPrograms, ...]:
        """The programs in which several sequences share steps: of 2, 4, ... columns; none where one is decoded at a time."""
        most = min(self.sequences or 1, most_sequences(self.checkpoint.config, self.formats))
        return tuple(self.programs(default_sms, sequences=count) for count in COLUMNS if 1 < count < 2 * most)

    def source(self) -> WeightSource:
        """The weights, reporting progress as they are taken."""
        if self.progress is None:
            return self.checkpoint.source
        return CountedSource(self.checkpoint, self.progress)


def columns_of(speculate: int, backend: str, config: ModelConfig, formats: Formats) -> int:
    """Columns of a sequence for so many drafts: 1 where the model has no programs of more; raises UserError for a number or a
    backend that cannot draft."""
    if not 0 <= speculate < MMA_COLUMNS:
        raise UserError(f"{speculate} drafts a step: use 0 (off) to {MMA_COLUMNS - 1}")
    if speculate and backend == "torch":
        raise UserError("plain PyTorch decodes one token a step: leave --speculate out, or use --backend gpu or vm")
    return min(next_power_of_two(speculate + 1), most_depth(config, formats))


def check_sequences(sequences: int | None, speculate: int, backend: str) -> None:
    """Raises UserError for a number of sequences that no backend, or not this one, decodes at once."""
    if sequences is None:
        return
    if not 1 <= sequences <= MMA_COLUMNS:
        raise UserError(f"{sequences} sequences at once: use 1 to {MMA_COLUMNS}")
    if sequences > 1 and backend == "vm":
        raise UserError("the CPU machine decodes one sequence at a time: leave --sequences out, or use --backend torch")
    if sequences > 1 and speculate:
        raise UserError("drafts take the columns that other sequences would: use --speculate or --sequences, not both")


def choose_backend(name: str) -> str:
    """ "gpu", "torch" or "vm"; raises UserError where the one asked for cannot be had."""
    if name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name in ("torch", "vm"):
        return name
    problem = gpu_problem()
    if name == "auto":
        return "gpu" if problem is None else "torch"
    if problem is not None:
        raise UserError(f"{problem}; use --backend torch")
    return "gpu"


def gpu_problem() -> str | None:
    """Why the kernel cannot run here, or None where it can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU found"
    capability = torch.cuda.get_device_capability()
    if capability != KERNEL_CAPABILITY:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernel needs 9.0 (H100, H200)"
    return None


def load_gpu(request: LoadRequest) -> Engine:
    """An engine on the GPU.  Triton is imported only here, so that the CPU machine runs without it."""
    from megakernel.gpu.backend import CHUNK, GpuBackend
    from megakernel.gpu.drafting import DraftingBackend
    from megakernel.gpu.sharing import SharingBackend
    from megakernel.prefill.prefill import Prefill

    if request.dtype != torch.bfloat16:
        raise UserError(f"the GPU backend runs bfloat16 weights, not {request.dtype}; leave dtype out, or use --backend torch")
    device = torch.device("cuda", torch.cuda.current_device())
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    if request.sms is not None and request.sms > sms:
        raise UserError(f"{request.sms} SMs asked for, the GPU has {sms}: the blocks could not all be resident; ask for fewer")
    programs = request.programs(sms)
    plan = Plan(request.checkpoint.config, programs.sms, programs.capacity, request.formats)
    needs = gpu_bytes(programs, plan.bytes if plan.possible else 0)
    drafted = request.programs(sms, request.depth) if request.depth > 1 else None
    shared = request.shared(sms)
    several = (*shared, *([] if drafted is None else [drafted]))
    needs["columns"] = sum(4 * each.shape(bucket).arena_elements for each in several for bucket in each.sizes)
    if shared:
        needs["KV cache"] = shared[-1].shape(request.capacity).cache_pages * PAGE_BYTES
    mend = mend_of(request.formats) if not shared else "ask for fewer --sequences or a smaller --context"
    check_memory(request.model, needs, torch.cuda.mem_get_info(device)[0], "GPU memory", mend)
    check_memory(request.model, packing_bytes(programs, request.checkpoint), available_bytes())
    for made in (programs, *several):
        made.build_ahead(range(len(made.sizes)))  # a request shall not wait for them
    try:
        model = pack(request.source(), request.checkpoint.config, request.dtype, request.capacity, request.formats)
        if request.stage is not None:
            request.stage("compiling the kernels, some seconds at a model's first start")
        prefill = Prefill if plan.possible else None
        if shared:
            return Engine(SharingBackend(model, programs, shared, device, prefill), chunk=CHUNK)
        if drafted is not None:
            return Engine(DraftingBackend(model, programs, drafted, device, prefill), chunk=CHUNK)
        return Engine(GpuBackend(model, programs, device, prefill), chunk=CHUNK)
    except BaseException:
        for made in (programs, *several):
            made.close()
        raise


def load_torch(request: LoadRequest) -> Engine:
    """An engine in plain PyTorch, on the device that it has."""
    if request.sms is not None:
        raise UserError(f"{request.sms} SMs asked for, plain PyTorch schedules none: leave --sms out, or use --backend vm")
    device, checkpoint = best_device(), request.checkpoint
    untied = Requantised(checkpoint.source, checkpoint.config, request.formats).untied()
    needs = torch_bytes(untied, request.dtype, request.capacity, PASS)
    staged = {"largest tensor": largest_tensor(checkpoint)}
    if device.type == "cpu":
        check_memory(request.model, needs | staged, available_bytes())
    else:
        check_memory(request.model, needs, free_bytes(device), f"{device.type.upper()} memory")
        check_memory(request.model, staged, available_bytes())
    with one_line("loading the model"):
        source = Requantised(request.source(), checkpoint.config, request.formats)
        config = source.untied()
        weights = Weights(config, request.dtype, device, source)
        return Engine(TorchBackend(TorchModel(config, weights, request.capacity), request.sequences))


def load_vm(request: LoadRequest) -> Engine:
    """An engine on the CPU machine."""
    programs = request.programs(DEFAULT_VM_SMS, request.depth)
    check_memory(request.model, vm_bytes(programs, request.checkpoint), available_bytes())
    model = pack(request.source(), request.checkpoint.config, request.dtype, request.capacity, request.formats)
    return Engine(VmBackend(model, programs))


class CountedSource:
    """A `WeightSource` that reports how many weights were taken."""

    def __init__(self, checkpoint: Checkpoint, progress: Progress) -> None:
        self._source, self._progress = checkpoint.source, progress
        self._total = parameter_count(checkpoint.config)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`."""
        done = 0
        self._progress(done, self._total)
        for name, tensor in self._source.tensors():
            yield name, tensor
            done += tensor.numel()
            self._progress(done, self._total)
